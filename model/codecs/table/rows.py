"""The codec of rows as a modality: DataFrames ↔ z of the numerical columns and tokens of the categorical ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...storage import pack_json
from ..base import ArraySpec, Codec, Parts, Stored, as_stored, require_fitted
from .cells import gaps
from .codec import TableCodec
from .column import ColumnCodec, from_tag, to_tag
from .encoding import EncodingConfig
from .schema import Schema, infer

CODEC = "codec.json"


class RowCodec(Codec):
    """Rows, a DataFrame or mappings {column: value}, ↔ {"num": z (N, D), "cat": tokens (N, C)}, whichever there are.

    Args:
        schema: what the columns are, see `Schema`; the rest is inferred by `fit`.

    Attributes:
        columns: the `TableCodec`, None before `fit`.
    """

    def __init__(self, encoding: EncodingConfig, schema: Schema | Mapping | str | None = None):
        self.encoding, self.schema = encoding, schema
        self.columns: TableCodec | None = None
        self.seed = 0

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> RowCodec:
        """Raises ValueError if the file is damaged."""
        try:
            return cls.of(TableCodec.from_json(json.loads(files[CODEC])))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{CODEC} is truncated or damaged") from None

    @classmethod
    def of(cls, columns: TableCodec) -> RowCodec:
        """The codec of fitted columns."""
        codec = cls(EncodingConfig())
        codec.columns = columns
        return codec

    @property
    def is_fitted(self) -> bool:
        return self.columns is not None

    @property
    def table(self) -> TableCodec:
        """The codec of the columns."""
        require_fitted(self)
        assert self.columns is not None
        return self.columns

    def fit(self, values: Sequence | pd.DataFrame, seed: int = 0) -> None:
        if self.columns is None:
            self.seed = seed
            table = as_table(values)
            schema = infer(table, None if self.schema is None else Schema.load(self.schema))
            self.columns = TableCodec.fit(table, schema, self.encoding, seed)

    def encode(self, values: Sequence | pd.DataFrame) -> Parts:
        """z is NaN where a cell is not regular (its token says why).

        Raises:
            ValueError: a cell without a code.
        """
        return self._encode(values, self.seed)

    def store(self, values: Sequence, seed: int = 0) -> Stored:
        return as_stored(self._encode(values, [self.seed, seed]))

    def specs(self, diffused: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        states = {"cat": self.table.states, "num": None}
        return {
            part: dataclasses.replace(spec, states=states[part], gaps=part == "num") for part, spec in diffused.items()
        }

    def _encode(self, values: Sequence | pd.DataFrame, seed: int | list[int]) -> Parts:
        tokens, z = self.table.encode(as_table(values), seed)
        if bool((tokens < 0).any()):
            name = self.table.categorical[int((tokens < 0).any(0).nonzero()[0, 0])]
            raise ValueError(f"column {name!r} has empty cells, and had none in training")
        return self._parts(z, tokens)

    def decode(self, x: Parts, seed: int = 0, start: int = 0) -> pd.DataFrame:
        """`start` counts the rows made before, for identifiers."""
        n = len(next(iter(x.values())))
        tokens, z = x.get("cat", torch.zeros(n, 0, dtype=torch.int64)), x.get("num", torch.zeros(n, 0))
        if len(self.table.numerical):
            columns = zip(self.table.numerical, z.unbind(1), strict=True)
            z = torch.stack([self.table.columns[name].quantiles.clip_tails(v) for name, v in columns], 1)
        sizes = torch.tensor(self.table.states, dtype=torch.int64)
        masked = tokens.cpu() >= sizes  # in states between the steps of a sampler
        rows = self.table.decode(torch.where(masked, 0, tokens.cpu()), z, seed, start)
        for c in masked.any(0).nonzero()[:, 0].tolist():
            name = self.table.categorical[c]
            rows[name] = rows[name].astype(object).mask(masked[:, c].numpy(), None)
        return rows

    def decode_samples(self, x: Parts, seed: int, start: int) -> pd.DataFrame:
        return self.decode(x, seed, start)

    def encode_cells(self, values: Sequence | pd.DataFrame) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{part: (tensor, mask of the known cells)}; missing cells and columns that are left out are not known.

        Raises:
            ValueError: an unknown column, or a value that the column does not have.
        """
        if wrong := [v for v in values if not isinstance(v, Mapping | pd.Series | str)]:
            raise ValueError(f"a row is a mapping {{column: value}}, got a {type(wrong[0]).__name__}")
        rows, rng = as_table(values), np.random.default_rng(0)
        if unknown := [name for name in rows if name not in self.table.columns]:
            raise ValueError(f"unknown column {unknown[0]!r}; there are {', '.join(map(str, self.table.columns))}")
        tokens = torch.zeros(len(rows), len(self.table.categorical), dtype=torch.int64)
        z = torch.zeros(len(rows), len(self.table.numerical))
        known = {"cat": torch.zeros(tokens.shape, dtype=torch.bool), "num": torch.zeros(z.shape, dtype=torch.bool)}
        for name in rows:
            column = self.table.columns[name]
            require_values(column, rows[name])
            own_tokens, own_z = column.encode(as_in_training(column, rows[name]), rng)
            present = rows[name].notna().to_numpy(copy=True)
            if own_tokens is not None:
                c = self.table.categorical.index(name)
                tokens[:, c] = torch.from_numpy(np.where(present, own_tokens, 0))
                known["cat"][:, c] = torch.from_numpy(present)
            if own_z is not None:  # a cell that is not regular has a token but no number: noise, as in training
                d, noise = self.table.numerical.index(name), rng.standard_normal(len(rows))
                z[:, d] = torch.from_numpy(np.where(np.isnan(own_z), noise, own_z))
                known["num"][:, d] = torch.from_numpy(present)
        return {part: (x, known[part]) for part, x in self._parts(z, tokens).items()}

    def with_given(self, rows: pd.DataFrame, given: Sequence | pd.DataFrame) -> pd.DataFrame:
        """Rows with the known numbers as given (see `encode_cells`); z only has the resolution of training."""
        cells = as_table(given).reset_index(drop=True)
        for name in cells:
            column = self.table.columns[name]
            if column.quantiles is not None:
                numbers = column.to_numbers(cells[name])
                known = np.isfinite(numbers)
                rows[name] = rows[name].mask(known, column.from_numbers(np.where(known, numbers, 0.0)))
        return rows

    def files(self) -> dict[str, bytes]:
        return {CODEC: pack_json(self.table.to_json())}

    def _parts(self, z: Tensor, tokens: Tensor) -> Parts:
        parts: dict[str, Tensor] = {}
        if self.table.numerical:
            parts["num"] = z
        if self.table.categorical:
            parts["cat"] = tokens
        return parts


def require_values(column: ColumnCodec, values: pd.Series) -> None:
    """ValueError if a cell holds several values, such as a range."""
    if values.dtype == object and any(isinstance(v, tuple | list | set | dict) for v in values):
        raise ValueError(
            f"column {column.name!r}: a condition is one value; ranges are for TableSynthesizer.sample(where=…)"
        )


def as_in_training(column: ColumnCodec, values: pd.Series) -> pd.Series:
    """Values of a categorical column; text stands for the category that is written so, say "1" for 1.

    Of a numerical column, texts that mean a missing cell become missing.

    Raises:
        ValueError: a value that the column does not have.
    """
    if column.is_numerical:
        words = gaps(column.column, values) & values.notna().to_numpy(dtype=bool)
        return values.mask(words, None) if words.any() else values
    if not column.states or column.column.kind == "identifier":
        return values
    tags = [tag for _, tag in column.value_states()] + [tag for tag, _ in column.rare]
    texts, known, unknown = {str(from_tag(tag)): from_tag(tag) for tag in tags}, set(tags), object()

    def find(value: Any) -> Any:
        if pd.isna(value):
            return None
        return value if to_tag(value) in known else texts.get(str(value), unknown)

    found = [find(value) for value in values]
    if unknown in found:
        shown = ", ".join(list(texts)[:12]) + (", …" if len(texts) > 12 else "")
        raise ValueError(f"column {column.name!r} has no value {values.iloc[found.index(unknown)]!r}; it has {shown}")
    return pd.Series(found, index=values.index, dtype=object)


def as_table(values: Any) -> pd.DataFrame:
    """Rows as a DataFrame."""
    return values if isinstance(values, pd.DataFrame) else pd.DataFrame(list(values))
