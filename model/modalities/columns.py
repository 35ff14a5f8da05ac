"""The kind `columns`: the columns of a table, numbers under Gaussian and categories under masked diffusion.

A modality of this kind has two parts, `num` and `cat`, as far as the table has such columns.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ... import kernels
from ...configs.config import Loss, SamplerConfig, Schedule, Section, StreamConfig
from ...diffusion.build import gaussian, masked
from ...diffusion.processes import Process
from ...kernels import Draw, Rng
from ..codecs.base import Parts, is_column
from ..codecs.table.encoding import EncodingConfig
from ..codecs.table.rows import CODEC, RowCodec
from ..codecs.table.schema import Schema, check_columns
from ..streams import Categories, Numbers, Stream
from ..table_dit import Categorical, Numerical
from .base import Modality

if TYPE_CHECKING:
    import pandas as pd


class NumericalConfig(Section):
    """Numerical columns: Gaussian diffusion of z-scores."""

    schedule: Schedule = Field(Schedule(), description="the noise schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    time_conditioning: Literal["sigma", "time", "log_snr"] = Field(
        "time", description="the network's input for the time"
    )
    prediction_type: Literal["epsilon", "v_prediction"] = Field("epsilon", description="what the network predicts")
    loss: Loss = Field(Loss(), description="scale is per column: a group's loss is the sum over its columns")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")


class CategoricalConfig(Section):
    """Categorical columns: masked diffusion."""

    delta: float = Field(1e-3, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    loss_on: Literal["all", "masked"] = Field("all", description="positions in the loss")
    mask_logit: Literal["kept"] | None = Field(
        None,
        description="kept: the head has a logit for the mask, whose share lowers the reverse rate (official table_dit)",
    )
    loss: Loss = Field(Loss(), description="scale is per column")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")


class CsvConfig(Section):
    """How text files of the table are written; what is null is guessed from each file, and usual in those we write."""

    sep: str | None = Field(None, description="between cells: one character, or tab")
    encoding: str | None = Field(None, description="Python's name of the encoding, say cp1252")
    decimal: Literal[".", ","] | None = Field(None, description="the decimal mark")


class Columns(Modality):
    """The numerical and categorical columns of a table row."""

    suffix: ClassVar[str] = ".csv"
    joined: ClassVar[bool] = True
    file_suffixes: ClassVar[tuple[str, ...]] = (".json",)

    encoding: EncodingConfig = Field(EncodingConfig(), description="of the columns")
    numerical: NumericalConfig = Field(NumericalConfig(), description="numerical columns")
    categorical: CategoricalConfig = Field(CategoricalConfig(), description="categorical columns")
    conditioning_prob: float = Field(
        0.0, ge=0, le=1, description="share of training rows in which random columns are conditions"
    )
    noise: Literal["iid", "sobol"] = Field(
        "iid", description="sobol: random numbers spread evenly over the rows, for statistics of lower variance"
    )
    missing: list[str] = Field(
        [""], min_length=1, description="strings that mean a missing cell in a CSV, beside the empty one"
    )
    csv: CsvConfig = Field(CsvConfig(), description="of text files")
    table_schema: dict[str, Any] | str | None = Field(
        None, description="what the columns are: a YAML file or its content; null: inferred"
    )
    sinusoids: int = Field(8, ge=0, description="mmdit: learned sinusoids of a number per column")
    stream: StreamConfig | None = Field(None, description="part of the network; null for table_dit")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _sobol_needs_first_hitting(self):
        if self.noise == "sobol" and self.categorical.sampler.method != "first_hitting":
            raise ValueError("noise: sobol needs categorical.sampler.method: first_hitting; or set noise: iid")
        return self

    def build_codec(self, files: Mapping[str, bytes]) -> RowCodec:
        if CODEC in files:
            return RowCodec.from_files(files)
        return RowCodec(self.encoding, self.table_schema)

    def build_process(self, codec: RowCodec):
        """`num` and `cat`; the categorical process has the largest number of states of a column."""
        processes: dict[str, Process] = {}
        table = codec.table
        if table.numerical:
            processes["num"] = gaussian((len(table.numerical),), self.numerical)
        if table.categorical:
            c = self.categorical
            processes["cat"] = masked(len(table.states), max(table.states), c, mask_logit=c.mask_logit)
        return processes

    def build_stream(self, codec: RowCodec) -> dict[str, Stream]:
        if self.stream is None:
            raise ValueError("columns in an mmdit need a stream: {width: …}")
        if self.categorical.mask_logit is not None:
            raise ValueError("categorical.mask_logit is for network.kind: table_dit")
        streams: dict[str, Stream] = {}
        table = codec.table
        if table.numerical:
            observed = self.conditioning_prob > 0
            streams["num"] = Numbers.of(
                self.stream, columns=len(table.numerical), sinusoids=self.sinusoids, observed=observed
            )
        if table.categorical:
            cat = Categories.of(self.stream, states=tuple(table.states))
            streams["cat"] = dataclasses.replace(cat, share="num", aligned=False) if table.numerical else cat
        return streams

    def build_groups(self, codec: RowCodec) -> dict[str, Any]:
        groups: dict[str, Numerical | Categorical] = {}
        table = codec.table
        if table.numerical:
            groups["num"] = Numerical(len(table.numerical))
        if table.categorical:
            groups["cat"] = Categorical(tuple(table.states))
        kept, observed = self.categorical.mask_logit is not None, self.conditioning_prob > 0
        return {"groups": groups, "mask_logit": kept, "observed": observed}

    def losses(self, processes):
        """The configured scales are per column."""
        losses = {"num": self.numerical.loss, "cat": self.categorical.loss}
        return {
            part: losses[part].model_copy(update={"scale": losses[part].scale * process.shape[0]})
            for part, process in processes.items()
        }

    def samplers(self) -> dict[str, SamplerConfig]:
        return {"num": self.numerical.sampler, "cat": self.categorical.sampler}

    def draw_observed(self, codec: RowCodec, rng: Rng, prefix: str) -> Parts:
        """In a share `conditioning_prob` of the rows, random columns are clean conditions.

        Each of these rows draws the probability of its columns; a column's token and its number go together.
        """
        if self.conditioning_prob == 0:
            return {}
        table = codec.table
        u = kernels.uniform(rng.keys(f"{prefix}known", Draw.CONDITIONED), len(table.columns) + 2)
        prob = torch.where(u[:, :1] <= self.conditioning_prob, u[:, 1:2], 0.0)
        observed = dict(zip(table.columns, (u[:, 2:] <= prob).unbind(1), strict=True))
        names = {"num": table.numerical, "cat": table.categorical}
        return {part: torch.stack([observed[name] for name in own], 1) for part, own in names.items() if own}

    def draw_uniforms(self, codec: RowCodec, seed: int, start: int, n: int) -> Parts:
        """Rows of a scrambled Sobol sequence: uniform each, and evenly spread over the rows."""
        if self.noise != "sobol":
            return {}
        sizes = {"num": len(codec.table.numerical), "cat": len(codec.table.categorical)}
        points = torch.quasirandom.SobolEngine(sum(sizes.values()), scramble=True, seed=seed).fast_forward(start)
        # points are multiples of 2⁻³⁰; the middle of their interval is never 0
        drawn = (points.draw(n, dtype=torch.float64) + 2.0**-31).split(list(sizes.values()), 1)
        return {part: u for part, u in zip(sizes, drawn, strict=True) if sizes[part]}

    def read(self, text: str) -> dict[str, str]:
        """{column: value} of a text column=value, column=value (a JSON object also works)."""
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is not valid JSON ({error})") from None
        (cells,) = list(csv.reader([text], skipinitialspace=True)) or [[]]
        pairs = [cell.partition("=") for cell in cells]
        if bad := [cell for cell, (name, sign, _) in zip(cells, pairs, strict=True) if not sign or not name]:
            raise ValueError(f"{bad[0]!r} is not of the form column=value")
        return {name.strip(): value.strip() for name, _, value in pairs}

    def from_file(self, path: Path) -> dict[str, Any]:
        """A JSON object {column: value}."""
        return self.read(path.read_text(encoding="utf-8"))

    def from_table(self, columns: Mapping[str, Any], field: str | None) -> Any:
        """The columns of the table schema, or all that no other modality takes; `field` only if it holds mappings."""
        import pandas as pd

        whole = [column for column in columns.values() if isinstance(column, pd.DataFrame)]
        own = columns.get(field or "")
        if not whole and own is not None and any(isinstance(cell, dict | Path) for cell in own):
            return own
        rows = pd.concat(whole, axis=1) if whole else pd.DataFrame({k: v for k, v in columns.items() if is_column(v)})
        if names := [column.name for column in self._schema().columns]:
            check_columns(rows, names)
            rows = rows[names]
        return rows if len(rows.columns) else None

    def csv_settings(self) -> dict[str, Any]:
        own = self.csv.model_dump(exclude_none=True)
        return {"missing": self.missing, "text_columns": self._schema().text_columns, **own}

    def _schema(self) -> Schema:
        return Schema() if self.table_schema is None else Schema.load(self.table_schema)

    def lines(self, values: pd.DataFrame) -> list[str]:
        text = values.to_csv(index=False, header=False, na_rep=self.missing[0])
        return [_csv_line(row) for row in csv.reader(io.StringIO(text))]

    def header(self, codec: RowCodec) -> str:
        return _csv_line(map(str, codec.table.columns))

    def split(self, values: pd.DataFrame) -> list[dict]:
        return values.to_dict("records")

    def as_raw(self, values: pd.DataFrame) -> pd.DataFrame:
        return values

    def render(self, value: Any) -> str:
        return ", ".join(f"{name} {cell}" for name, cell in dict(value).items())

    def encode_condition(self, codec: RowCodec, values: Sequence) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Rows in which missing cells are sampled."""
        return codec.encode_cells(values)

    def restore(self, codec: RowCodec, values: pd.DataFrame, given: Sequence) -> pd.DataFrame:
        return codec.with_given(values, given)

    def encode_mask(self, codec: RowCodec, masks: Sequence) -> Tensor:
        raise ValueError("cells that are left out or empty are sampled: a row has no mask")

    def read_mask(self, codec: RowCodec, path: str) -> Tensor:
        return self.encode_mask(codec, [path])

    def features(self, codec: RowCodec, values: pd.DataFrame) -> np.ndarray:
        """Numbers as z, categories one-hot."""
        parts, blocks = codec.encode(values), []
        if "num" in parts:
            blocks.append(np.nan_to_num(parts["num"].numpy().astype(np.float64)))
        for c, states in enumerate(codec.table.states):
            blocks.append(parts["cat"][:, c, None].numpy().clip(0) == np.arange(states))
        return np.concatenate(blocks, 1)

    def attributes(self, codec: RowCodec, values: pd.DataFrame) -> dict[str, np.ndarray]:
        """The categorical columns."""
        columns = codec.table.columns.items()
        names = [name for name, c in columns if c.states and c.quantiles is None and not c.is_numerical]
        cells = {str(name): values[name].astype(object).where(values[name].notna(), "") for name in names}
        return {name: column.astype(str).to_numpy() for name, column in cells.items()}


def _csv_line(cells) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(list(cells))
    return out.getvalue()
