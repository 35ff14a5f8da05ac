"""Between raw data and a native state space: images ↔ tensors, captions ↔ tokens, tables ↔ numbers and tokens."""
