"""One diffusion model over any mix of state spaces, any part sampled from any other."""

import importlib

from .configs.version import __version__

PUBLIC = {
    "Codec": "model.codecs.base",
    "Condition": "sample.condition",
    "DiscreteModality": "model.modalities.base",
    "GaussianModality": "model.modalities.base",
    "Guidance": "diffusion.guidance",
    "InMemory": "train.data.dataset",
    "Modality": "model.modalities.base",
    "Pipeline": "sample.pipeline",
    "Sampler": "sample.steppers",
    "Space": "diffusion.space",
    "TableSynthesizer": "train.synthesizer",
    "Trainer": "train.trainer",
    "load_config": "configs.load",
    "parse_config": "configs.load",
}
__all__ = [*PUBLIC, "__version__"]  # noqa: PLE0604, RUF100


def __getattr__(name: str) -> object:
    """The public names, imported when they are first used: importing torch takes seconds."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
