"""Conversion of the official tabular network's weights (TableDiT) into ours and back.

The official network has one embedding table and one head per categorical column; ours has one matrix with the rows of
all columns. The second time, s, of an official two-time network is the time of one column, our group `target`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from ..table_dit import Categorical, Numerical, TableDiT

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
    """(number of numerical columns, states of every categorical column) of an official state dict."""
    table = state.get("numerical_embedder.embedding_table.weight")
    states = []
    while f"{TABLES}.{len(states)}.weight" in state:
        states.append(len(state[f"{TABLES}.{len(states)}.weight"]) - 1)  # the last row is the mask
    return (0 if table is None else len(table)), tuple(states)


def architecture(state: Mapping[str, Tensor], heads: int = 4, target: str | None = None) -> TableDiT:
    """A TableDiT of the sizes of an official state dict, with random weights.

    Args:
        heads: attention heads, which the shapes of the weights do not show.
        target: "num" or "cat" if the first numerical or categorical column has the time s of a two-time network; None
            if no column has it.
    """
    numerical, states = official_sizes(state)
    groups: dict[str, Numerical | Categorical] = {}
    if target == "num":
        groups["target"], numerical = Numerical(1), numerical - 1
    if numerical:
        groups["num"] = Numerical(numerical)
    if target == "cat":
        groups["target"], states = Categorical(states[:1]), states[1:]
    if states:
        groups["cat"] = Categorical(states)
    width, inner = state["t_embedder.mlp.2.bias"].shape[0], state["blocks.0.mlp.fc1.bias"].shape[0]
    time_conditioning = [next(m for m in groups if m != "target")]
    if "s_embedder.mlp.0.weight" in state:
        time_conditioning.append("target")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return TableDiT(groups, width, depth, heads, time_conditioning, inner // width)


def from_official(model: TableDiT, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(our state dict for `model`, the unused official keys) from an official state dict.

    Raises:
        ValueError: a key that the network needs is missing.
    """
    used = set()

    def take(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"official checkpoint lacks {key!r}: is it a tabular snapshot?")
        used.add(key)
        return state[key]

    ours = {key: take(official_key) for official_key, key in _equal_tensors(model).items()}
    ours["position"] = torch.cat([take(key) for key in _position_keys(model)])
    tables = [take(f"{TABLES}.{c}.weight") for c in range(_count(model, model.categorical))]
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
    """The official state dict of a TableDiT, the inverse of `from_official`."""
    ours = model.state_dict()
    official = {official_key: ours[key] for official_key, key in _equal_tensors(model).items()}
    counts = [_count(model, groups) for groups in (model.numerical, model.categorical) if groups]
    official |= dict(zip(_position_keys(model), ours["position"].split(counts), strict=True))
    sizes = [k + 1 for m in model.categorical for k in model.groups[m].states]
    if sizes:
        official |= {f"{TABLES}.{c}.weight": part for c, part in enumerate(ours["token_table"].split(sizes))}
    for m, columns in _head_columns(model):
        for layer, kind in itertools.product((0, 2), KINDS):
            for c, part in zip(columns, ours[f"head.{m}.hidden.{layer}.{kind}"], strict=True):
                official[f"{HEADS}.{c}.{layer}.{kind}"] = part.T if kind == "weight" else part
        for kind in KINDS:
            parts = ours[f"head.{m}.{kind}"].split([sizes[c] for c in columns])
            official |= {f"{HEADS}.{c}.4.{kind}": part for c, part in zip(columns, parts, strict=True)}
    return official


def load_official(state: Mapping[str, Tensor], heads: int = 4, target: str | None = None) -> tuple[TableDiT, list[str]]:
    """(a TableDiT with the weights of an official state dict, the unused official keys)."""
    model = architecture(state, heads, target)
    ours, unused = from_official(model, state)
    model.load_state_dict(ours)
    return model, unused


def _count(model: TableDiT, groups: list[str]) -> int:
    """The number of columns of these groups."""
    return sum(model.groups[m].columns for m in groups)


def _position_keys(model: TableDiT) -> list[str]:
    """The official names of the position embeddings, whose concatenation is ours."""
    keys = ["numerical_pos_embed.weight"] if model.numerical else []
    return [*keys, "categorical_pos_embed.weight"] if model.categorical else keys


def _head_columns(model: TableDiT) -> list[tuple[str, range]]:
    """(categorical group, official indices of its columns)."""
    ranges, start = [], 0
    for m in model.categorical:
        ranges.append((m, range(start, start + model.groups[m].columns)))
        start += model.groups[m].columns
    return ranges


def _equal_tensors(model: TableDiT) -> dict[str, str]:
    """{official key: our key} of the tensors that are the same in both."""
    layers = {}
    for embedder, m in zip(("t_embedder", "s_embedder"), model.time, strict=False):
        layers |= {f"{embedder}.mlp.{i}": f"time.{m}.mlp.{i}" for i in (0, 2)}
    for d in range(len(model.blocks)):
        layers |= {f"blocks.{d}.{official}": f"blocks.{d}.{ours}" for official, ours in BLOCK.items()}
    layers["final_layer.adaLN_modulation.1"] = "final"
    if model.numerical:
        for i in (0, 2, 4):
            layers[f"numerical_embedder.scale_embedder.{i}"] = f"number_scale.{i}"
            layers[f"final_layer.numerical_linear.{i}"] = f"number_head.{i}"
    tensors = {f"{official}.{kind}": f"{ours}.{kind}" for official, ours in layers.items() for kind in KINDS}
    if model.numerical:
        tensors["numerical_embedder.embedding_table.weight"] = "number_table"
    return tensors
