"""Settings that had other names in earlier versions: the configs of saved runs hold the old ones."""

from __future__ import annotations

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


def split_balanced(raw: dict[str, Any]) -> dict[str, Any]:
    """A whole config with the earlier `loss_on: balanced` as `loss.weighting: balanced` on masked positions.

    Raises:
        ValueError: the loss has another weighting as well.
    """
    section = raw.get("categorical")
    if not isinstance(section, dict) or section.get("loss_on") != "balanced":
        return raw
    loss = section.get("loss") or {}
    if loss.get("weighting", "none") not in ("none", "balanced"):
        raise ValueError(
            "categorical.loss_on: balanced weighs by itself: set categorical.loss.weighting: balanced instead"
        )
    loss = {**loss, "weighting": "balanced"}
    return {**raw, "categorical": {**section, "loss_on": "masked", "loss": loss}}


def _today(place: str, key: str) -> tuple[str, dict[Any, Any]]:
    parts = place.split(".")
    if parts[0] == "modalities" and len(parts) > 2:
        place = ".".join(["modalities", "*", *parts[2:]])
    return RENAMED.get(f"{place}{key}", (key, {}))


def _value(values: dict[Any, Any], value: Any) -> Any:
    return values.get(value, value) if isinstance(value, str) else value
