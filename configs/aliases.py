"""Settings that had other names in earlier versions: the configs of saved runs hold the old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# old path: (new name of its last part, {old value: new value}); * stands for any name
RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "modalities.*.time_input": ("time_conditioning", {}),
    "modalities.*.predicts": ("prediction_type", {"eps": "epsilon", "v": "v_prediction"}),
    "modalities.*.mask_column": ("mask_logit", {"extra": "ignored"}),
    "modalities.*.counted": ("loss_on", {}),
    "modalities.*.stream.tower": ("single_stream_depth", {}),
    "modalities.*.stream.head": ("output", {}),
    "modalities.*.sampler.kind": ("method", {}),
    "modalities.*.sampler.grid": ("time_grid", {}),
    "times.skew": ("time_skew", {}),
    "times.hold": ("condition_prob", {}),
    "train.accumulate": ("gradient_accumulation_steps", {}),
    "train.warmup": ("warmup_steps", {}),
    "train.decay": ("lr_schedule", {}),
    "train.clip": ("max_grad_norm", {}),
    "train.recompute": ("activation_checkpointing", {}),
    "train.nonfinite": ("on_nonfinite_grad", {}),
    "train.keep": ("keep_last", {}),
    "sample.chunk": ("batch_size", {}),
    # tables
    "encoding.discrete": ("max_discrete_values", {}),
    "encoding.spike": ("spike_share", {}),
    "encoding.most": ("max_categories", {}),
    "encoding.knots": ("n_quantiles", {}),
    "encoding.ends": ("tail_rows", {}),
    "numbers": ("numerical", {}),
    "numerical.time_input": ("time_conditioning", {}),
    "numerical.predicts": ("prediction_type", {"eps": "epsilon", "v": "v_prediction"}),
    "numerical.sampler.kind": ("method", {}),
    "numerical.sampler.grid": ("time_grid", {}),
    "tokens": ("categorical", {}),
    "categorical.counted": ("loss_on", {}),
    "categorical.mask_column": ("mask_logit", {"leak": "kept"}),
    "categorical.sampler.kind": ("method", {}),
    "categorical.sampler.grid": ("time_grid", {}),
    "network.clocks": ("time_conditioning", {}),
    "known": ("conditioning_prob", {}),
    "draws": ("noise", {"independent": "iid"}),
}
REMOVED = ("engine",)  # fast or plain; both drew the same random numbers
KINDS = {"gaussian": "image", "masked": "text", "uniform": "text"}  # of a process, before modalities said their kind
TABLE = ("encoding", "numerical", "categorical", "conditioning_prob", "noise", "missing")  # once at the top of a file
TABLE_BASE, TABLE_MODALITY = "table/base", "row"  # what a file of a table implied, and the name of its modality


def modernize(raw: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The settings of a file under today's names, values included; what is unknown stays as it is.

    Raises:
        ValueError: a setting occurs under both of its names.
    """
    out: dict[str, Any] = {}
    for key, value in raw.items():
        if not place and key in REMOVED:
            continue
        name, values = _today(place, key)
        if name in out:
            raise ValueError(f"{place}{key} and {place}{name} are the old and the new name of one setting: keep one")
        inner = f"{place}{name}."
        out[name] = modernize(value, inner) if isinstance(value, dict) else _value(values, value)
    return out


def upgrade(raw: dict[str, Any], table_base: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A whole config of an earlier version as one of today's.

    Args:
        table_base: the content of `TABLE_BASE`, over which the settings of a table are laid.

    Raises:
        ValueError: `loss_on: balanced` with another weighting as well.
    """
    raw = dict(raw)
    table = {key: raw.pop(key) for key in TABLE if key in raw and len(raw.get("modalities") or "1") == 1}
    network = raw.get("network")
    if table or ("modalities" not in raw and isinstance(network, dict) and "width" in network):
        if "modalities" not in raw:
            raw = merge(table_base(), raw)
        name = next(iter(raw["modalities"]), TABLE_MODALITY)
        whole = merge(raw, {"modalities": {name: table}})
        raw = merge(whole, {"modalities": {name: _split_balanced(whole["modalities"][name])}})
    if isinstance(raw.get("data"), dict):
        raw["data"] = _upgrade_data(dict(raw["data"]))
    if isinstance(raw.get("modalities"), dict):
        raw["modalities"] = {m: _with_kind(section) for m, section in raw["modalities"].items()}
    return raw


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section."""
    both = {k: merge(base[k], v) for k, v in own.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **own, **both}


def _upgrade_data(data: dict[str, Any]) -> dict[str, Any]:
    """`source` for the earlier `name` and `path`."""
    name, path = data.pop("name", None), data.pop("path", None)
    if path is not None:
        data["source"] = path
    elif name not in (None, "npz", "packed"):
        data["source"] = name
    return data


def _with_kind(section: Any) -> Any:
    """A modality's section with its kind, which its process told earlier."""
    if not isinstance(section, dict):
        return section
    process = str(section.get("process"))
    kind = section.get("kind") or KINDS.get(process)
    if process == "gaussian" and kind == KINDS["gaussian"]:
        section = {key: value for key, value in section.items() if key != "process"}
    return section if kind is None else {"kind": kind, **section}


def _split_balanced(table: dict[str, Any]) -> dict[str, Any]:
    """The settings of a table, the earlier `loss_on: balanced` as `loss.weighting: balanced` on masked positions."""
    section = table.get("categorical")
    if not isinstance(section, dict) or section.get("loss_on") != "balanced":
        return table
    loss = section.get("loss") or {}
    if loss.get("weighting", "none") not in ("none", "balanced"):
        raise ValueError(
            "categorical.loss_on: balanced weighs by itself: set categorical.loss.weighting: balanced instead"
        )
    loss = {**loss, "weighting": "balanced"}
    return {**table, "categorical": {**section, "loss_on": "masked", "loss": loss}}


def _today(place: str, key: str) -> tuple[str, dict[Any, Any]]:
    parts = place.split(".")
    if parts[0] == "modalities" and len(parts) > 2:
        place = ".".join(["modalities", "*", *parts[2:]])
    return RENAMED.get(f"{place}{key}", (key, {}))


def _value(values: dict[Any, Any], value: Any) -> Any:
    return values.get(value, value) if isinstance(value, str) else value
