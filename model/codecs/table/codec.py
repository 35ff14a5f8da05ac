"""The codec of a table: a DataFrame ↔ tokens (N, C) of its categorical columns and z (N, C) of its numerical ones.

How a column of each kind is encoded is described in `column`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .column import ColumnCodec
from .encoding import EncodingConfig
from .quantiles import Quantiles
from .schema import Column, Schema, check_columns


class TableCodec:
    """The codecs of all columns of a table.

    `categorical` names the columns that have a token, `numerical` those that have a z. A numerical column with missing
    cells or frequent values is in both.
    """

    def __init__(self, columns: list[ColumnCodec], rows: int):
        self.columns, self.rows = {c.name: c for c in columns}, rows
        self.categorical = [c.name for c in columns if c.states]
        self.numerical = [c.name for c in columns if c.quantiles is not None]

    @classmethod
    def fit(cls, table: pd.DataFrame, schema: Schema, config: EncodingConfig, seed: int = 0) -> TableCodec:
        """The codec of a training table.

        Args:
            schema: of complete columns, as `schema.infer` returns it.

        Raises:
            ValueError: the schema does not fit the table, or no column can be modelled.
        """
        check_columns(table, [c.name for c in schema.columns])
        rng = np.random.default_rng(seed)
        codec = cls([ColumnCodec.fit(c, table[c.name], config, rng) for c in schema.columns], len(table))
        if not codec.categorical and not codec.numerical:
            raise ValueError(
                "nothing to model: every column is constant or an identifier; set another kind in the schema"
            )
        return codec

    @property
    def schema(self) -> Schema:
        return Schema(columns=[c.column for c in self.columns.values()])

    @property
    def states(self) -> list[int]:
        """The number of states of every categorical column."""
        return [len(self.columns[name].states) for name in self.categorical]

    def encode(self, table: pd.DataFrame, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens (N, C) int64 and z (N, C) float32.

        The token of a missing cell is −1 if its column has no such state; z is NaN where a cell is not regular.

        Raises:
            ValueError: a column is missing, or a cell has no code; names the column.
        """
        check_columns(table, list(self.columns))
        rng = np.random.default_rng(seed)
        codes = {name: c.encode(table[name], rng) for name, c in self.columns.items()}
        tokens = [codes[name][0] for name in self.categorical]
        z = [codes[name][1] for name in self.numerical]
        return (
            torch.from_numpy(np.stack(tokens, 1)) if tokens else torch.zeros(len(table), 0, dtype=torch.int64),
            torch.from_numpy(np.stack(z, 1).astype(np.float32)) if z else torch.zeros(len(table), 0),
        )

    def decode(self, tokens: Tensor, z: Tensor, seed: int = 0, start: int = 0) -> pd.DataFrame:
        """The table of tokens (N, C) and z (N, C); `start` counts the rows made before, for identifiers."""
        rng, n = np.random.default_rng([seed, start] if start else seed), len(tokens)
        token_columns = dict(zip(self.categorical, tokens.cpu().numpy().T, strict=True))
        z_columns = dict(zip(self.numerical, z.float().cpu().numpy().T, strict=True))
        return pd.DataFrame(
            {name: c.decode(token_columns.get(name), z_columns.get(name), n, rng, start)
             for name, c in self.columns.items()}
        )  # fmt: skip

    def to_json(self) -> dict:
        """The content of codec.json."""
        rows = []
        for c in self.columns.values():
            row = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
            row["column"] = c.column.model_dump()
            row["quantiles"] = None if c.quantiles is None else dataclasses.asdict(c.quantiles)
            rows.append(row)
        return {"rows": self.rows, "columns": rows}

    @classmethod
    def from_json(cls, saved: dict) -> TableCodec:
        """The codec of a codec.json."""
        columns = []
        for row in saved["columns"]:
            quantiles = None if row["quantiles"] is None else Quantiles(**row["quantiles"])
            columns.append(ColumnCodec(**{**row, "column": Column(**row["column"]), "quantiles": quantiles}))
        return cls(columns, saved["rows"])
