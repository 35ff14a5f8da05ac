"""Networks, their parts, codecs between raw data and state spaces, and official weights."""

from .mmdit import MMDiT, Patches, Tokens

__all__ = ["MMDiT", "Patches", "Tokens"]
