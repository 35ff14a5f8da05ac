"""Weights of the official tabular network (TableDiT), into ours and back.

Official networks keep one table and one head per categorical column; here all columns' rows lie in one matrix. The
time `s` of a two-time network belongs to one column of its own, the group `target`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..table_dit import Categories, Numbers, TableDiT

KINDS = ("weight", "bias")
BLOCK = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "ff.0",
    "mlp.fc2": "ff.2",
    "adaLN_modulation.1": "modulation",
}
TABLES, HEADS = "categorical_embedder.embedding_table_list", "final_layer.categorical_linear_list"


def is_table(state: Mapping[str, Tensor]) -> bool:
    """Whether an official state dict is of the tabular network."""
    return "t_embedder.mlp.0.weight" in state and any(key.startswith("final_layer.") for key in state)


def official_sizes(state: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """The number of numerical columns, and the states of every categorical one, of an official state dict."""
    table = state.get("numerical_embedder.embedding_table.weight")
    states = []
    while (key := f"{TABLES}.{len(states)}.weight") in state:
        states.append(len(state[key]) - 1)
    return (0 if table is None else len(table)), tuple(states)


def architecture(state: Mapping[str, Tensor], heads: int = 4, target: str | None = None) -> TableDiT:
    """A TableDiT of the shape that an official state dict describes; weights are not loaded.

    Args:
        heads: attention heads, which the weights do not tell.
        target: of a two-time network, the kind of the first column that has the time s: "num", "cat" or None.
    """
    numbers, states = official_sizes(state)
    groups: dict[str, Numbers | Categories] = {}
    if target == "num":
        groups["target"], numbers = Numbers(1), numbers - 1
    if numbers:
        groups["num"] = Numbers(numbers)
    if target == "cat":
        groups["target"], states = Categories(states[:1]), states[1:]
    if states:
        groups["cat"] = Categories(states)
    width, inner = state["t_embedder.mlp.2.bias"].shape[0], state["blocks.0.mlp.fc1.bias"].shape[0]
    clocks = [next(m for m in groups if m != "target")]
    if "s_embedder.mlp.0.weight" in state:
        clocks.append("target")
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    return TableDiT(groups, width, depth, heads, clocks, inner // width)


def from_official(model: TableDiT, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict for `model` from an official one, and the official keys that were not used.

    Raises:
        ValueError: a key that the network needs is missing.
    """
    used = set()

    def take(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"official checkpoint lacks {key!r}: is it a tabular snapshot?")
        used.add(key)
        return state[key]

    ours = {mine: take(theirs) for theirs, mine in _plain(model).items()}
    positions = [take(key) for key, there in _positions(model) if there]
    ours["position"] = torch.cat(positions)
    tables = [take(f"{TABLES}.{c}.weight") for c in range(_categorical(model))]
    if tables:
        ours["token_table"] = torch.cat(tables)
    for m, columns in _head_columns(model):
        for layer, kind in itertools.product((0, 2), KINDS):
            parts = torch.stack([take(f"{HEADS}.{c}.{layer}.{kind}") for c in columns])
            ours[f"head.{m}.hidden.{layer}.{kind}"] = parts.transpose(1, 2) if kind == "weight" else parts
        for kind in KINDS:
            ours[f"head.{m}.{kind}"] = torch.cat([take(f"{HEADS}.{c}.4.{kind}") for c in columns])
    return ours, sorted(set(state) - used)


def to_official(model: TableDiT) -> dict[str, Tensor]:
    """The official state dict of a table model built with this architecture."""
    ours = model.state_dict()
    theirs = {key: ours[mine] for key, mine in _plain(model).items()}
    numbers = sum(model.groups[m].columns for m in model.numbers)
    split = ours["position"].split([numbers, len(ours["position"]) - numbers])
    theirs |= {key: part for (key, there), part in zip(_positions(model), split, strict=True) if there}
    sizes = [k + 1 for m in model.categories for k in model.groups[m].states]
    if sizes:
        theirs |= {f"{TABLES}.{c}.weight": part for c, part in enumerate(ours["token_table"].split(sizes))}
    for m, columns in _head_columns(model):
        own = [sizes[c] for c in columns]
        for layer, kind in itertools.product((0, 2), KINDS):
            stacked = ours[f"head.{m}.hidden.{layer}.{kind}"]
            for c, part in zip(columns, stacked, strict=True):
                theirs[f"{HEADS}.{c}.{layer}.{kind}"] = part.T if kind == "weight" else part
        for kind in KINDS:
            parts = ours[f"head.{m}.{kind}"].split(own)
            theirs |= {f"{HEADS}.{c}.4.{kind}": part for c, part in zip(columns, parts, strict=True)}
    return theirs


def load_official(state: Mapping[str, Tensor], heads: int = 4, target: str | None = None) -> tuple[TableDiT, list[str]]:
    """A TableDiT holding the weights of an official state dict, and the official keys left unused."""
    model = architecture(state, heads, target)
    ours, unused = from_official(model, state)
    model.load_state_dict(ours)
    return model, unused


def _categorical(model: TableDiT) -> int:
    return sum(model.groups[m].columns for m in model.categories)


def _positions(model: TableDiT) -> list[tuple[str, bool]]:
    return [
        ("numerical_pos_embed.weight", bool(model.numbers)),
        ("categorical_pos_embed.weight", bool(model.categories)),
    ]


def _head_columns(model: TableDiT) -> list[tuple[str, range]]:
    """The official column numbers of every categorical group."""
    found, start = [], 0
    for m in model.categories:
        found.append((m, range(start, start + model.groups[m].columns)))
        start += model.groups[m].columns
    return found


def _plain(model: TableDiT) -> dict[str, str]:
    """{official key: ours} of all that is the same tensor in both."""
    layers = {}
    for embedder, m in zip(("t_embedder", "s_embedder"), model.time, strict=False):
        layers |= {f"{embedder}.mlp.{i}": f"time.{m}.mlp.{i}" for i in (0, 2)}
    for d in range(len(model.blocks)):
        layers |= {f"blocks.{d}.{theirs}": f"blocks.{d}.{mine}" for theirs, mine in BLOCK.items()}
    layers["final_layer.adaLN_modulation.1"] = "final"
    if model.numbers:
        for i in (0, 2, 4):
            layers[f"numerical_embedder.scale_embedder.{i}"] = f"number_scale.{i}"
            layers[f"final_layer.numerical_linear.{i}"] = f"number_head.{i}"
    plain = {f"{theirs}.{kind}": f"{mine}.{kind}" for theirs, mine in layers.items() for kind in KINDS}
    if model.numbers:
        plain["numerical_embedder.embedding_table.weight"] = "number_table"
    return plain
