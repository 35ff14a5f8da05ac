"""Opens the source of images with captions that the user names."""

from __future__ import annotations

from pathlib import Path

from ....configs.config import Data
from ....configs.locate import is_hub_id, locate, not_found
from ....model.build import modalities_of
from .. import sources
from .caption_tables import TableSource
from .image_text import ANY, minimal_config
from .links import LinkSource
from .sources import IMAGE, IMAGE_SUFFIXES, TEXT, CaptionedImages, RawSource

TABLE_SUFFIXES = (".arrow", ".parquet")


def open_source(
    source: str, captions: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> RawSource:
    """Images with captions: a list of links, Parquet or Arrow files, a hub id, or whatever a config can name.

    Args:
        captions: of a list of links: a table of keys and captions.
        image_column, caption_column: column names of a table.

    Raises:
        ValueError: not found, or of an unsupported kind.
    """
    path = locate(source)
    if path is None and not is_hub_id(source):
        raise ValueError(not_found("source", source))
    if path is None or path.suffix in TABLE_SUFFIXES or (path.is_dir() and _holds_tables(path)):
        return TableSource(path or source, image_column, caption_column)
    if path.suffix in (".tsv", ".txt"):
        return LinkSource(path, str(locate(captions) or captions) if captions else None)
    named = {IMAGE: image_column, TEXT: caption_column}
    data = Data(source=str(path), fields={m: name for m, name in named.items() if name is not None})
    return CaptionedImages(str(path), sources.open_source(data, modalities_of(minimal_config(ANY))))


def _holds_tables(folder: Path) -> bool:
    """Whether a folder holds Parquet or Arrow files and no images."""
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    return not suffixes.isdisjoint(TABLE_SUFFIXES) and suffixes.isdisjoint(IMAGE_SUFFIXES)
