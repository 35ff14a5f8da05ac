"""One diffusion model over any mix of state spaces, any part sampled from any other."""

from .configs.version import __version__

__all__ = ["TableSynthesizer", "__version__"]


def __getattr__(name: str):
    if name == "TableSynthesizer":
        from .train.synthesizer import TableSynthesizer

        return TableSynthesizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
