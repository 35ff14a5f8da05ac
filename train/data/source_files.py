"""Data sets in folders of files: those of one example have the same name, say 0001.png and 0001.txt."""

from __future__ import annotations

from pathlib import Path

from ...configs.config import Data
from .dataset import InMemory, Opened, by_split, split_named
from .fields import Modalities, as_values, find_fields, pick


def open_files(folder: Path, data: Data, modalities: Modalities) -> Opened:
    """The examples of a folder, whose subfolders may be named train, test or validation.

    A modality has the files whose ending its kind knows, or, where several modalities have the same one,
    NAME.MODALITY.ENDING. The name of the folder that an example lies in is the field `folder`.

    Raises:
        ValueError: no files of a modality, an unreadable one, or examples without a split while others have one.
    """
    names = [data.fields.get(m, m) for m in modalities]
    examples: dict[Path, dict[str, Path]] = {}  # {path without endings: {modality's name or ending: file}}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            stem, ending = file.with_suffix(""), file.suffix.lower()
            tag = stem.suffix[1:]
            stem, ending = (stem.with_suffix(""), tag) if tag in names else (stem, ending)
            examples.setdefault(stem, {}).setdefault(ending, file)
    endings = _endings(names, modalities, {ending for files in examples.values() for ending in files})
    every = {ending for own in endings.values() for ending in own}
    examples = {stem: files for stem, files in examples.items() if every & files.keys()}
    if not examples:
        wanted = "; ".join(f"{m}: {', '.join(modality.file_suffixes)}" for m, modality in modalities.items())
        raise ValueError(f"{folder} holds no table and no files of the modalities ({wanted})")
    columns = {
        name: [next((files[e] for e in own if e in files), None) for files in examples.values()]
        for name, own in endings.items()
    }
    places = [stem.parent.relative_to(folder).parts for stem in examples]
    columns.setdefault("folder", [parts[-1] if parts and not split_named(parts[-1:]) else None for parts in places])
    found = find_fields(columns, modalities, data, folder)
    values, _ = pick(columns, modalities, data, found, folder)
    values = {m: as_values(column, modalities[m], f"{folder}, {m}") for m, column in values.items()}
    splits = [split_named(parts[:1]) for parts in places]
    return by_split(InMemory(values), splits if len(set(splits)) > 1 else [""] * len(splits), folder)


def _endings(names: list[str], modalities: Modalities, present: set[str]) -> dict[str, list[str]]:
    """{field of a modality: the keys of its files}, as far as there are some."""
    out: dict[str, list[str]] = {}
    for name, modality in zip(names, modalities.values(), strict=True):
        free = [e for e in modality.file_suffixes if e in present and not any(e in own for own in out.values())]
        if own := [name] if name in present else free:
            out[name] = own
    return out
