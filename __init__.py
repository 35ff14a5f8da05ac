"""One diffusion model over any mix of state spaces, any part sampled from any other."""

__version__ = "0.1.0"
