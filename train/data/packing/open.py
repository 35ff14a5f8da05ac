"""Opens the source that the user names."""

from __future__ import annotations

from pathlib import Path

from ....configs.locate import is_hub_id, locate, not_found
from .caption_tables import TableSource
from .links import LinkSource
from .sources import IMAGE_SUFFIXES, FolderSource, NpzSource, RawSource

TABLE_SUFFIXES = (".arrow", ".parquet")


def open_source(
    source: str, captions: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> RawSource:
    """An .npz, a folder of images, Parquet or Arrow files (one or a folder of them), a list of links, or a hub id.

    Args:
        captions: of a list of links: a table of keys and captions.
        image_column, caption_column: column names of a table.

    Raises:
        ValueError: not found, or of an unsupported kind.
    """
    path = locate(source)
    if path is None:
        if not is_hub_id(source):
            raise ValueError(not_found("source", source))
        return TableSource(source, image_column, caption_column)
    if path.is_dir():
        return TableSource(path, image_column, caption_column) if _holds_tables(path) else FolderSource(path)
    if path.suffix == ".npz":
        return NpzSource(path)
    if path.suffix in TABLE_SUFFIXES:
        return TableSource(path, image_column, caption_column)
    if path.suffix in (".tsv", ".txt"):
        return LinkSource(path, str(locate(captions) or captions) if captions else None)
    raise ValueError(
        f"{path}: give an .npz, a folder of images with captions, .parquet or .arrow, or a list of links (.tsv, .txt)"
    )


def _holds_tables(folder: Path) -> bool:
    """Whether a folder holds Parquet or Arrow files and no images."""
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    return not suffixes.isdisjoint(TABLE_SUFFIXES) and suffixes.isdisjoint(IMAGE_SUFFIXES)
