"""What a config of a table says: its modality and codec, the schema of its columns, the reading of CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...configs.config import Config
from ...model.build import build_codecs, modalities_of
from ...model.codecs.table.rows import RowCodec
from ...model.codecs.table.schema import Schema, infer


def row_codec(config: Config) -> tuple[str, RowCodec]:
    """The modality of a config of a table and nothing else, and its codec, which is not fitted.

    Raises:
        ValueError: it is a config of other modalities.
    """
    codecs = build_codecs(config)
    m, codec = next(iter(codecs.items()))
    if len(codecs) > 1 or not isinstance(codec, RowCodec):
        raise ValueError(
            f"config {config.name} has the modalities {', '.join(codecs)}: a table needs one of columns and no other, "
            "as in table/default; mixes are for anystate train"
        )
    return m, codec


def schema_of(table: pd.DataFrame, config: Config, given: Schema | Mapping | str | Path | None = None) -> Schema:
    """What the columns of a table are: as `given`, or else as the config says; the rest is inferred.

    Raises:
        ValueError: the schema does not fit the table; names the column.
    """
    _, codec = row_codec(config)
    known = codec.schema if given is None else given
    return infer(table, None if known is None else Schema.load(known))


def csv_settings(config: Config) -> dict[str, Any]:
    """How a config of a table reads text files: the arguments of `files.read_table`, but for the path."""
    m, _ = row_codec(config)
    return modalities_of(config)[m].csv_settings()


def missing_strings(config: Config) -> list[str]:
    """The strings that mean a missing cell in the CSV files of a config of a table; the first is written."""
    return csv_settings(config)["missing"]
