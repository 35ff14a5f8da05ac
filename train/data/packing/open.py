"""Which source is behind what the user names."""

from __future__ import annotations

from pathlib import Path

from ....configs.locate import locate, not_found
from .caption_tables import Table
from .links import Links
from .sources import PICTURES, Folder, Npz, Source


def open_source(
    source: str, captions: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """An .npz, a folder of pictures, Parquet or Arrow files (one or a folder of them), a list of links, or a hub id.

    Raises:
        ValueError: nothing there, or nothing that can be packed.
    """
    path = locate(source)
    if path is None:
        if source.count("/") != 1 or Path(source).suffix:
            raise ValueError(not_found("source", source))
        return Table(source, image_column, caption_column)
    if path.is_dir():
        names = (p.suffix.lower() for p in path.rglob("*"))
        kinds = {"table" if name in (".arrow", ".parquet") else "pictures" for name in names if name in KNOWN}
        return Table(path, image_column, caption_column) if kinds == {"table"} else Folder(path)
    if path.suffix == ".npz":
        return Npz(path)
    if path.suffix in (".arrow", ".parquet"):
        return Table(path, image_column, caption_column)
    if path.suffix in (".tsv", ".txt"):
        return Links(path, str(locate(captions) or captions) if captions else None)
    raise ValueError(
        f"{path}: give an .npz, a folder of pictures with captions, .parquet or .arrow, or a list of links (.tsv, .txt)"
    )


KNOWN = (*PICTURES, ".arrow", ".parquet")
