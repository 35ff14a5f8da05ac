"""Import of a checkpoint of the official tabular code as a checkpoint of ours, which `anystate table sample` takes.

The official network knows columns by their position alone: numerical columns in one order, categorical ones in another,
the target first of its kind; categories are numbered in sorted order, and numbers are made normal by scikit-learn's
QuantileTransformer. So the import needs the table that the network was trained on beside the weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from ...configs.config import Config
from ...configs.load import load_config
from ...configs.runs import latest
from ..build import Codecs, build_codecs, build_network, codec_files
from ..codecs.table.codec import TableCodec
from ..codecs.table.column import MISSING
from ..codecs.table.files import read_table
from ..codecs.table.quantiles import Quantiles
from ..codecs.table.rows import RowCodec
from ..codecs.table.schema import Column, Schema, infer_column
from ..codecs.table.tags import sort_tags
from ..storage import check_shapes
from .files import read_pt, save_imported, weight_sets
from .table import HEADS, KINDS, TABLES, architecture, from_official, is_table, official_sizes

RECIPE = "table/paper"
TAIL = 1e-7  # probability at which scikit-learn clips normal scores


@dataclasses.dataclass(frozen=True)
class TableReport:
    """The tensors of an official checkpoint by whether they were used; `used` and `unused` are official names."""

    folder: Path
    weights: list[str]
    used: list[str]
    unused: list[str]
    columns: dict[str, int | None]  # number of categories, None of a numerical column

    def lines(self) -> list[str]:
        """The report as text."""
        kinds = "raw and EMA weights" if len(self.weights) == 2 else f"{self.weights[0]} weights, used as both sets"
        lines = [f"{len(self.used)} tensors used, {len(self.unused)} not ({kinds})"]
        lines += [f"  not used: {key}" for key in self.unused]
        return [*lines, f"{len(self.columns)} columns, sample with: anystate table sample {self.folder.parent}"]


@dataclasses.dataclass(frozen=True)
class OfficialTable:
    """Training rows, and the names of the columns in the official order: the target first of its kind."""

    rows: pd.DataFrame
    numerical: list[str]
    categorical: list[str]


def import_table(
    source: Path, out: Path, table: Path | str, weights: str | None = None, overrides: Sequence[str] = ()
) -> TableReport:
    """Write the official checkpoint `source` as a checkpoint into the run folder `out`.

    Args:
        source: the .pt of the official trainer, or one state dict in a .pt.
        table: folder of the training set: train.csv[.gz] with schema.yaml (as `anystate table fetch` writes it) or with
            the official info.json.
        weights: "raw" or "ema" imports one of the two sets as both; default: each as itself. (The official sampling
            script reads the raw set.)
        overrides: settings that the weights do not show, on top of configs/table/paper.yaml, e.g. "network.heads=4",
            or "numerical.schedule.name=linear_half" for a network trained with VP-LinearBeta2.

    Raises:
        ValueError: nothing there, a damaged file or one that holds code, the network of another table; `out` has a
            checkpoint already.
    """
    source, out = Path(source), Path(out)
    if latest(out):
        raise ValueError(f"{out} already holds a checkpoint: choose another --out")
    if weights not in (None, "raw", "ema"):
        raise ValueError(f"weights must be raw or ema, got {weights!r}")
    states, step = read_sets(source, weights)
    example = next(iter(states.values()))
    official = read_official_table(table)
    config = describe(example, overrides)
    codec = official_codec(official, config)
    _check_sizes(source, example, official, codec)
    codecs: Codecs = {next(iter(config.modalities)): RowCodec.of(codec)}
    net, ours, unused = build_network(config, codecs), {}, []
    for kind, state in states.items():
        ours[kind], unused = from_official(net, reorder(state, official, codec))
        check_shapes(source, net.state_dict(), ours[kind])
    used = sorted(set(example) - set(unused))
    origin = {"file": str(source), "weights": sorted(states), "step": step, "used": used, "unused": unused}
    folder = save_imported(out, step, ours, config, origin, codec_files(codecs))
    sizes = {name: len(c.states) if name in official.categorical else None for name, c in codec.columns.items()}
    return TableReport(folder, sorted(states), used, unused, sizes)


def read_sets(file: Path, weights: str | None = None) -> tuple[dict[str, Mapping[str, Tensor]], int]:
    """The sets of weights {"raw" or "ema": state dict} of an official .pt, and the optimizer steps (0 if unknown).

    Raises:
        ValueError: no such file, a damaged one, one with code in it, or without the weights of a table.
    """
    if not file.is_file():
        raise ValueError(f"official checkpoint {str(file)!r} not found")
    content = read_pt(file)
    sets = weight_sets(content, weights or "ema")
    if weights is not None:
        sets = {kind: state for kind, state in sets.items() if kind == weights}
    if not sets or not all(is_table(state) for state in sets.values()):
        what = "weights of a table network" if weights is None else f"{weights} weights of a table network"
        raise ValueError(f"{file} has no {what}; it holds {', '.join(map(str, content))[:160]}")
    slots = content["opt"].get("state", {}) if isinstance(content.get("opt"), dict) else {}
    step = next((slot["step"] for slot in slots.values() if "step" in slot), 0)
    return sets, int(step)


def read_official_table(table: Path | str) -> OfficialTable:
    """The training rows of a set and the official order of its columns, see `import_table`."""
    folder = Path(table)
    train = next((folder / name for name in ("train.csv", "train.csv.gz") if (folder / name).is_file()), None)
    if train is None:
        raise ValueError(f"--table {str(table)!r} is no folder with a train.csv or train.csv.gz")
    rows = read_table(train)
    if (folder / "schema.yaml").is_file():
        schema = Schema.load(folder / "schema.yaml")
        numerical, categorical = schema.roles()
        targets, task = ([] if schema.target is None else [schema.target]), schema.task
    elif (folder / "info.json").is_file():
        numerical, categorical, targets, task = _read_info(folder / "info.json")
    else:
        raise ValueError(
            f"{folder} has no description of its columns: a schema.yaml or the official info.json is needed"
        )
    first = numerical if task == "regression" else categorical
    first[:0] = [name for name in targets if name not in first]
    for name in [*numerical, *categorical]:
        if name not in rows:
            raise ValueError(f"{train} lacks column {name!r}")
    return OfficialTable(rows, numerical, categorical)


def _read_info(file: Path) -> tuple[list[str], list[str], list[str], str]:
    """(numerical, categorical, targets, task) of an official info.json."""
    info = json.loads(file.read_text(encoding="utf-8"))
    names = info["column_names"]
    columns = ([names[i] for i in info[f"{kind}_col_idx"]] for kind in ("num", "cat", "target"))
    return *columns, info["task_type"]


def describe(state: Mapping[str, Tensor], overrides: Sequence[str] = ()) -> Config:
    """The official recipe with the sizes that a state dict shows."""
    net = architecture(state)
    sizes = [f"network.width={net.width}", f"network.depth={len(net.blocks)}", f"network.mlp={net.mlp}"]
    if len(net.time) == 2:  # the target has a time of its own; joint sampling uses both times
        sizes.append("times.draw=decoupled")
    return load_config(RECIPE, [*sizes, *overrides])


def official_codec(table: OfficialTable, config: Config) -> TableCodec:
    """The official encoding of a table: categories in sorted order, numbers by scikit-learn's quantile curve."""
    rows, columns = table.rows.copy(), []
    for name in rows.columns:
        if name in table.numerical:
            if not pd.api.types.is_numeric_dtype(rows[name]):
                raise ValueError(f"column {name!r} should hold numbers, as the network was trained on them")
            rows[name] = rows[name].fillna(rows[name].mean())
            columns.append(_numerical_column(name, rows[name]))
        elif name in table.categorical:
            dtype = str(rows[name].dtype)
            columns.append(Column(name=name, kind="categorical", dtype=dtype, missing=bool(rows[name].isna().any())))
    (own,) = build_codecs(config).values()
    assert isinstance(own, RowCodec)  # as in RECIPE
    codec = TableCodec.fit(rows, Schema(columns=columns), own.encoding, config.seed)
    for name, column in codec.columns.items():
        if name in table.numerical:
            column.states = []
            column.quantiles = _official_quantiles(rows[name].to_numpy(np.float64), column.width)
        else:
            tags = sort_tags([tag for _, tag in column.value_states()])
            column.states = [["v", tag] for tag in tags] + [MISSING] * (MISSING in column.states)
    return TableCodec(list(codec.columns.values()), len(rows))


def _numerical_column(name: str, values: pd.Series) -> Column:
    column = infer_column(name, values)
    is_integer = column.kind == "integer" or column.decimals == 0
    return column.model_copy(update={"kind": "integer" if is_integer else "continuous"})


def _official_quantiles(values: np.ndarray, width: float) -> Quantiles:
    """The curve of scikit-learn's QuantileTransformer with the official number of quantiles."""
    n = min(len(values), max(min(len(values) // 30, 1000), 10))
    share = np.linspace(0.0, 1.0, n)
    value = np.quantile(values, share)
    return Quantiles(share.tolist(), value.tolist(), width, TAIL, float(values.min()), float(values.max()))


def reorder(state: Mapping[str, Tensor], table: OfficialTable, codec: TableCodec) -> dict[str, Tensor]:
    """An official state dict with its columns in the order of the codec's."""
    reordered = dict(state)
    numerical = [table.numerical.index(name) for name in codec.numerical]
    if numerical:
        for key in ("numerical_embedder.embedding_table.weight", "numerical_pos_embed.weight"):
            reordered[key] = state[key][numerical]
    categorical = [table.categorical.index(name) for name in codec.categorical]
    if categorical:
        reordered["categorical_pos_embed.weight"] = state["categorical_pos_embed.weight"][categorical]
    for c, official in enumerate(categorical):
        reordered[f"{TABLES}.{c}.weight"] = state[f"{TABLES}.{official}.weight"]
        for layer, kind in itertools.product((0, 2, 4), KINDS):
            reordered[f"{HEADS}.{c}.{layer}.{kind}"] = state[f"{HEADS}.{official}.{layer}.{kind}"]
    return reordered


def _check_sizes(source: Path, state: Mapping[str, Tensor], table: OfficialTable, codec: TableCodec) -> None:
    """ValueError unless the network has the table's columns and as many values in each."""
    numerical, states = official_sizes(state)
    if (numerical, len(states)) != (len(table.numerical), len(table.categorical)):
        raise ValueError(f"{source} is of another table: it has {numerical} numerical and {len(states)} categorical "
                         f"columns, the table {len(table.numerical)} and {len(table.categorical)}")  # fmt: skip
    for name, size in zip(table.categorical, states, strict=True):
        if (own := len(codec.columns[name].states)) != size:
            raise ValueError(f"{source} is of another table: column {name!r} has {size} values there, {own} here")
