"""One diffusion model over any mix of state spaces, any part sampled from any other."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "TableSynthesizer":
        from .train.synthesizer import TableSynthesizer

        return TableSynthesizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
