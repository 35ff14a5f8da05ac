"""Which column, array or file of a source holds which modality, and how its cells become raw values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.config import Data
from ...model.modalities.base import Modality
from .dataset import is_table

Modalities = Mapping[str, Modality]


def find_fields(names: Iterable, modalities: Modalities, data: Data, where: object) -> dict[str, str]:
    """{modality: the name that holds its values}, as far as there is one.

    It is the one that `data.fields` says, the modality's own name, or a synonym of its kind that no other modality
    takes; upper and lower case do not matter.

    Raises:
        ValueError: `data.fields` says a name that is not there.
    """
    fields, exact = data.fields, {str(name): name for name in names}
    lower = {name.lower(): own for name, own in exact.items()}
    found = {}
    for m in modalities:
        if m in fields and fields[m] not in exact:
            raise ValueError(f"{where}: data.fields.{m} is {fields[m]!r}; there are {', '.join(exact)}")
        if m in fields:
            found[m] = exact[fields[m]]
    for m in modalities:
        if m not in found and m.lower() in lower:
            found[m] = exact.get(m, lower[m.lower()])
    for m, modality in modalities.items():
        free = [lower[s] for s in modality.synonyms if s in lower and lower[s] not in found.values()]
        if m not in found and free:
            found[m] = free[0]
    return found


def pick(
    columns: Mapping[str, Any], modalities: Modalities, data: Data, found: Mapping[str, str], where: object
) -> tuple[dict[str, Any], list[str]]:
    """{modality: its values} out of named columns, as they are, and the names of those that no modality takes.

    found: {modality: name of its column}, see `find_fields`.

    Raises:
        ValueError: a modality has none; names it and what there is.
    """
    values, takers = {}, {name: m for m, name in found.items()}
    for m, modality in modalities.items():
        free = {name: column for name, column in columns.items() if takers.get(name, m) == m}
        try:
            values[m] = modality.from_table(free, found.get(m))
        except ValueError as error:
            raise ValueError(f"{where}, {m}: {error}") from None
        if values[m] is None:
            name = data.fields.get(m, m)
            raise ValueError(
                f"{where}: no array, column or file {name!r} for the modality {m}; there are "
                f"{', '.join(map(str, columns)) or 'none'} (data.fields names others)"
            )
        if is_table(values[m]):
            if m in data.fields:
                raise ValueError(f"data.fields.{m}: {m} takes all columns that no other modality takes")
            takers |= dict.fromkeys(values[m], m)
    return values, [name for name in columns if name not in takers]


def as_values(values: Any, modality: Modality, what: str) -> Any:
    """The raw values of a modality from the cells of a column; missing ones are None, several versions a list.

    Raises:
        ValueError: a cell that the modality cannot read; names `what` and the example.
    """
    if is_table(values):
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind not in "OUS":
        absent = np.isnan(values).all(tuple(range(1, values.ndim))) if values.dtype.kind == "f" else np.zeros(1, bool)
        return [None if none else value for none, value in zip(absent, values, strict=True)] if absent.any() else values
    out = []
    for i, cell in enumerate(values if isinstance(values, list) else values.tolist()):
        try:
            out.append(read_cell(cell, modality))
        except (ValueError, OSError) as error:
            raise ValueError(f"{what}, example {i}: {error}") from None
    return out


def read_cell(cell: Any, modality: Modality) -> Any:
    """The raw value of a cell: text as the kind reads it, a file as it opens it, numbers in lists as an array."""
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"}:  # an image or a sound of a Hugging Face data set
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        cell = cell.tolist()
    if isinstance(cell, list | tuple):
        if not all(isinstance(part, str | bytes | dict | Path | None) for part in cell):
            return np.array([np.asarray(part).tolist() for part in cell])
        versions = [read_cell(part, modality) for part in cell]
        return [version for version in versions if version is not None] or None
    if isinstance(cell, Path):
        value = modality.from_file(cell)
        return None if isinstance(value, list | str) and not value else value
    if is_missing(cell):
        return None
    if isinstance(cell, str):
        return modality.read(cell)
    return str(cell) if modality.prompts and not isinstance(cell, bytes) else cell


def is_missing(cell: Any) -> bool:
    """Whether a cell is None, NaN, NaT, NA or empty text."""
    if isinstance(cell, str | bytes):
        return not cell
    if cell is None or isinstance(cell, np.ndarray | dict | list | tuple | Path):
        return cell is None
    return type(cell).__name__ == "NAType" or cell != cell
