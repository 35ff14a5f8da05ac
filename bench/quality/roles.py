"""The image and the text of a model, which the families labels, fid and clip measure."""

from __future__ import annotations

from ...configs.config import Config
from ...model.build import modalities_of
from ...sample.pipeline import Pipeline


def images_of(config: Config) -> list[str]:
    """The modalities that are images."""
    return [m for m, modality in modalities_of(config).items() if "fid" in modality.metrics]


def texts_of(config: Config) -> list[str]:
    """The modalities that are texts."""
    return [m for m, modality in modalities_of(config).items() if modality.prompts]


def image_and_text(pipeline: Pipeline) -> tuple[str, str] | None:
    """The image and the text of a model that has one of each, besides any other modalities."""
    images, texts = images_of(pipeline.config), texts_of(pipeline.config)
    return (images[0], texts[0]) if len(images) == len(texts) == 1 else None


def require_one(names: list[str], what: str, family: str) -> str:
    """The only one of the modalities.

    Raises:
        ValueError: there are none, or several.
    """
    if len(names) != 1:
        raise ValueError(f"--metrics {family} needs a model with one {what} modality, this one has {len(names)}")
    return names[0]


def has_pixels(pipeline: Pipeline, m: str) -> bool:
    """Whether what is diffused of an image are its pixels, not latents."""
    return pipeline.modalities[m].grid_levels(pipeline.codecs[m]) is not None
