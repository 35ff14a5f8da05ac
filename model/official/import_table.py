"""A checkpoint of the official tabular code as a checkpoint of ours, which `anystate table sample` takes.

Official networks know columns by place alone: numbers in one order, categories in another, the target first of its kind
(first of the numbers in a regression), categories numbered in sorted order, numbers turned into normal scores by
scikit-learn's QuantileTransformer. So the table that the network was trained on is needed beside the weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from torch import Tensor

from ...configs.load import load_config
from ...configs.runs import latest
from ...configs.table import TableConfig
from ..build import build_table_network
from ..codecs.table.codec import MISSING, Encoding, Quantiles, TableCodec, sort_tags
from ..codecs.table.columns import Column, Schema, infer_column
from ..codecs.table.files import read_table
from ..storage import check_shapes, pack_json
from .files import read_pt, save_imported, weight_sets
from .table import HEADS, KINDS, TABLES, architecture, from_official, is_table, official_sizes

RECIPE = "table/paper"
BEYOND = 1e-7  # share beyond either end of scikit-learn's normal scores


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What became of a checkpoint's tensors; `used` and `unused` are official names."""

    folder: Path
    weights: list[str]
    used: list[str]
    unused: list[str]
    columns: dict[str, int | None]

    def lines(self) -> list[str]:
        """The report as text."""
        kinds = "raw and EMA weights" if len(self.weights) == 2 else f"{self.weights[0]} weights, taken for both sets"
        lines = [f"{len(self.used)} tensors used, {len(self.unused)} not ({kinds})"]
        lines += [f"  not used: {key}" for key in self.unused]
        return [*lines, f"{len(self.columns)} columns, sample with: anystate table sample {self.folder.parent}"]


@dataclasses.dataclass(frozen=True)
class OfficialTable:
    """Training rows and the official order of their columns, target first of its kind."""

    rows: pd.DataFrame
    numerical: list[str]
    categorical: list[str]


def import_table(
    source: Path, out: Path, table: Path | str, weights: str | None = None, overrides: Sequence[str] = ()
) -> TableReport:
    """Write the official checkpoint `source` as a checkpoint into the run folder `out`.

    Args:
        source: the .pt of the official trainer, or one state dict in a .pt.
        table: folder of the set it was trained on: train.csv[.gz] beside schema.yaml (as `anystate table fetch` writes
            it) or beside the official info.json.
        weights: "raw" or "ema" takes one of the two sets; by default each goes to its own place. (The official
            sampling script reads the raw set.)
        overrides: settings that the weights do not tell, on top of configs/table/paper.yaml, e.g. "network.heads=4",
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
    net, ours, unused = build_table_network(config, codec), {}, []
    for kind, state in states.items():
        ours[kind], unused = from_official(net, reorder(state, official, codec))
        check_shapes(source, net.state_dict(), ours[kind])
    used = sorted(set(example) - set(unused))
    origin = {"file": str(source), "weights": sorted(states), "step": step, "used": used, "unused": unused}
    folder = save_imported(out, step, ours, config, origin, {"codec.json": pack_json(codec.to_json())})
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
    """The training rows of a set and what its columns are, see `import_table`."""
    folder = Path(table)
    train = next((folder / name for name in ("train.csv", "train.csv.gz") if (folder / name).is_file()), None)
    if train is None:
        raise ValueError(f"--table {str(table)!r} is no folder with a train.csv or train.csv.gz")
    rows = read_table(train)
    if (folder / "schema.yaml").is_file():
        roles = yaml.safe_load((folder / "schema.yaml").read_text(encoding="utf-8"))
        numerical, categorical = list(roles["numerical"]), list(roles["categorical"])
        targets, task = [roles["target"]], roles["task"]
    elif (folder / "info.json").is_file():
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        names = info["column_names"]
        numerical, categorical, targets = (
            [names[i] for i in info[f"{kind}_col_idx"]] for kind in ("num", "cat", "target")
        )
        task = info["task_type"]
    else:
        raise ValueError(f"{folder} says not what its columns are: a schema.yaml or the official info.json is needed")
    first = numerical if task == "regression" else categorical
    first[:0] = [name for name in targets if name not in first]
    for name in [*numerical, *categorical]:
        if name not in rows:
            raise ValueError(f"{train} lacks column {name!r}")
    return OfficialTable(rows, numerical, categorical)


def describe(state: Mapping[str, Tensor], overrides: Sequence[str] = ()) -> TableConfig:
    """The official recipe with the sizes that a state dict shows."""
    net = architecture(state)
    known = [f"network.width={net.width}", f"network.depth={len(net.blocks)}", f"network.mlp={net.mlp}"]
    if len(net.time) == 2:  # a clock for the target alone: joint sampling runs it beside the other
        known.append("times.draw=decoupled")
    return load_config(RECIPE, [*known, *overrides], TableConfig)


def official_codec(table: OfficialTable, config: TableConfig) -> TableCodec:
    """The official encoding of a table: categories in sorted order, numbers by scikit-learn's quantile curve."""
    rows, columns = table.rows.copy(), []
    for name in rows.columns:
        if name in table.numerical:
            if not pd.api.types.is_numeric_dtype(rows[name]):
                raise ValueError(f"column {name!r} should hold numbers, as the network was trained on them")
            rows[name] = rows[name].fillna(rows[name].mean())
            found = infer_column(name, rows[name])
            kind = "continuous" if found.decimals != 0 and found.kind != "integer" else "integer"
            columns.append(found.model_copy(update={"kind": kind}))
        elif name in table.categorical:
            dtype = str(rows[name].dtype)
            columns.append(Column(name=name, kind="categorical", dtype=dtype, missing=bool(rows[name].isna().any())))
    codec = TableCodec.fit(rows, Schema(columns=columns), Encoding(**config.encoding.model_dump()), config.seed)
    quantiles = min(len(rows), max(min(len(rows) // 30, 1000), 10))
    for name, column in codec.columns.items():
        if name in table.numerical:
            values = rows[name].to_numpy(np.float64)
            share = np.linspace(0.0, 1.0, quantiles)
            low, high, value = values.min(), values.max(), np.quantile(values, share)
            column.states = []
            column.quantiles = Quantiles(share.tolist(), value.tolist(), column.width, BEYOND, float(low), float(high))
        else:
            own = sort_tags([state[1] for state in column.states if state[0] == "v"])
            column.states = [["v", tag] for tag in own] + [MISSING] * (MISSING in column.states)
    return TableCodec(list(codec.columns.values()), len(rows))


def reorder(state: Mapping[str, Tensor], table: OfficialTable, codec: TableCodec) -> dict[str, Tensor]:
    """An official state dict with its columns in the order of the table."""
    state = dict(state)
    places = [table.numerical.index(name) for name in codec.numbers]
    for key in ("numerical_embedder.embedding_table.weight", "numerical_pos_embed.weight"):
        if places:
            state[key] = state[key][places]
    places = [table.categorical.index(name) for name in codec.tokens]
    if places:
        state["categorical_pos_embed.weight"] = state["categorical_pos_embed.weight"][places]
    moved = {}
    for c, place in enumerate(places):
        moved[f"{TABLES}.{c}.weight"] = state[f"{TABLES}.{place}.weight"]
        for layer in (0, 2, 4):
            for kind in KINDS:
                moved[f"{HEADS}.{c}.{layer}.{kind}"] = state[f"{HEADS}.{place}.{layer}.{kind}"]
    return state | moved


def _check_sizes(source: Path, state: Mapping[str, Tensor], table: OfficialTable, codec: TableCodec) -> None:
    """ValueError unless the network has the table's columns and as many values in each."""
    numbers, states = official_sizes(state)
    here = f"{len(table.numerical)} numerical and {len(table.categorical)} categorical columns"
    if (numbers, len(states)) != (len(table.numerical), len(table.categorical)):
        raise ValueError(f"{source} is of another table: it has {numbers} numerical and {len(states)} categorical "
                         f"columns, the table {here}")  # fmt: skip
    for name, size in zip(table.categorical, states, strict=True):
        if (own := len(codec.columns[name].states)) != size:
            raise ValueError(f"{source} is of another table: column {name!r} has {size} values there, {own} here")
