"""From raw values that are known, say a caption or some cells of a row, to conditions of the sampler."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..diffusion import Space
from ..model.build import Codecs, Names
from ..model.codecs.base import Parts, as_parts
from ..model.modalities.base import Modality
from .condition import Condition


class Model(Protocol):
    """What is asked of a `Pipeline` here."""

    codecs: Codecs
    space: Space
    net: Any

    @property
    def modalities(self) -> dict[str, Modality]: ...

    @property
    def names(self) -> Names: ...

    def modality_of(self, process: str) -> str: ...


@dataclasses.dataclass(frozen=True)
class Conditions:
    """{process: R conditions} (empty: joint sampling), and how many samples each of the R gets.

    given: {modality: the R raw values, or the single one}, of clean conditions without a mask.
    """

    conditions: dict[str, Condition]
    copies: int
    given: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of samples."""
        return self.copies * (len(next(iter(self.conditions.values())).x) if self.conditions else 1)

    def of_samples(self, samples: range) -> dict[str, Condition]:
        """The conditions of these samples; sample i has condition i // copies."""
        index = torch.arange(samples.start, samples.stop) // self.copies
        return {k: c.map(lambda x: x[index]) for k, c in self.conditions.items()}

    def restore(self, model: Model, decoded: Mapping[str, Sequence], samples: range) -> dict[str, Sequence]:
        """Decoded samples in which what was given is as it was given, see `Modality.restore`."""
        out = dict(decoded)
        for m, values in self.given.items():
            rows = [i // self.copies if len(values) > 1 else 0 for i in samples]
            own = values.iloc[rows] if hasattr(values, "iloc") else [values[i] for i in rows]
            out[m] = model.modalities[m].restore(model.codecs[m], out[m], own)
        return out

    def digest(self) -> dict[str, str]:
        """{process: SHA-256 of its conditions}: differs between requests whose files have changed."""
        return {k: _sha256(*([c.x] if c.mask is None else [c.x, c.mask])) for k, c in self.conditions.items()}


def encode_raw(
    model: Model,
    values: Mapping[str, Any],
    masks: Mapping[str, Any],
    noise_levels: Mapping[str, float],
    copies: int,
) -> Conditions:
    """The conditions of `Pipeline.__call__`, see there.

    Raises:
        ValueError: names the modality and what is wrong with its value, mask or time.
    """
    if copies < 1:
        raise ValueError(f"n must be at least 1, got {copies}")
    for what, given in (("conditions", values), ("masks", masks), ("noise_levels", noise_levels)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{what} are a dictionary {{modality: value}}, got a {type(given).__name__}")
        for m in given:
            check_modality(model, what, m)
    conditions: dict[str, Condition] = {}
    for m, value in values.items():
        conditions |= encode_condition(model, m, several(value), m)
    for m, mask in masks.items():
        require_condition(model, conditions, m, f"masks: {m}", f"conditions={{{m!r}: …}}")
        conditions |= inside(model, conditions, m, _encode_mask(model, m, several(mask)), m)
    for m, time in noise_levels.items():
        require_condition(model, conditions, m, f"noise_levels: {m}", f"conditions={{{m!r}: …}}")
        conditions |= at_time(conditions, model.names[m].values(), time, f"noise_levels: {m}")
    conditions = as_many(model, conditions)
    check_conditions(model, conditions, "conditions={{{m!r}: …}}")
    return Conditions(conditions, copies, exact(model, conditions, {m: several(v) for m, v in values.items()}, masks))


def several(value: Any) -> Sequence:
    """The values of a modality: a list or a DataFrame holds several, anything else is one."""
    is_table = hasattr(value, "iloc") and hasattr(value, "columns")
    return value if is_table or isinstance(value, list) else [value]


def encode_condition(model: Model, m: str, values: Sequence, where: str, **options: Any) -> dict[str, Condition]:
    """{process: condition} of R raw values of a modality; where they are known in part, with masks.

    where: put before errors; options: of the kind's `encode_condition`.
    """
    if not len(values):
        raise ValueError(f"{where}: there are no values")
    try:
        parts = model.modalities[m].encode_condition(model.codecs[m], values, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return without_full_masks({model.names[m][part]: Condition(x, mask=mask) for part, (x, mask) in parts.items()})


def inside(
    model: Model, conditions: Mapping[str, Condition], m: str, mask: Tensor | Parts, where: str
) -> dict[str, Condition]:
    """The conditions of a modality restricted to the elements inside its R masks, or a single one."""
    names, parts = model.names[m], as_parts(mask)
    if unknown := sorted(set(parts) - set(names)):
        raise ValueError(f"{where}: a mask of {unknown[0] or 'all of it'} is not possible, only of {', '.join(names)}")
    out = {k: conditions[k] for k in names.values() if k in conditions}
    counts = {len(c.x) for c in out.values()} | {len(own) for own in parts.values()}
    n = max(counts)
    if counts - {1, n}:
        raise ValueError(f"{where}: give as many masks as values, or one, got {' and '.join(map(str, sorted(counts)))}")
    out = {k: repeated(c, n) for k, c in out.items()}
    for part, own in parts.items():
        condition = out[names[part]]
        known = aligned(own, condition.x.shape, where).expand(n, *condition.x.shape[1:])
        known = known if condition.mask is None else known & condition.mask
        out[names[part]] = dataclasses.replace(condition, mask=known)
    return without_full_masks(out)


def exact(
    model: Model, conditions: Mapping[str, Condition], values: Mapping[str, Sequence], masks: Mapping[str, Any]
) -> dict[str, Sequence]:
    """The raw values of modalities that are clean conditions without a mask, see `Conditions`."""
    noisy = {model.modality_of(k) for k, c in conditions.items() if c.t > 0}
    return {m: raw for m, raw in values.items() if m not in noisy and m not in masks}


def aligned(mask: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """A mask (N, …) as (N, *shape): its axes are the last ones of the values."""
    extra = [1] * (len(shape) - mask.ndim)
    try:
        return mask.reshape(len(mask), *extra, *mask.shape[1:]).expand(len(mask), *shape[1:])
    except RuntimeError:
        got, expected = tuple(mask.shape[1:]), tuple(shape[1:])
        raise ValueError(f"{where}: the mask has shape {got}, the model takes {expected}") from None


def at_time(
    conditions: Mapping[str, Condition], processes: Iterable[str], time: Any, where: str
) -> dict[str, Condition]:
    """The conditions of these processes, noised to a time, a number or its text."""
    try:
        t = float(time)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {time!r} is not a number") from None
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"{where}: a noise time is in [0, 1], got {time}")
    return {k: dataclasses.replace(conditions[k], t=t) for k in processes if k in conditions}


def without_full_masks(conditions: dict[str, Condition]) -> dict[str, Condition]:
    """The conditions of one modality; without masks if all of its elements are known."""
    if all(c.mask is None or bool(c.mask.all()) for c in conditions.values()):
        return {k: dataclasses.replace(c, mask=None) for k, c in conditions.items()}
    return conditions


def as_many(model: Model, conditions: Mapping[str, Condition]) -> dict[str, Condition]:
    """The conditions, all equally many: a single one of a modality goes with all of the others."""
    counts = {model.modality_of(k): len(c.x) for k, c in conditions.items()}
    n = max(counts.values(), default=1)
    if any(count not in (1, n) for count in counts.values()):
        listed = ", ".join(f"{count} of {m}" for m, count in counts.items())
        raise ValueError(f"give equally many values of each modality, or one, got {listed}")
    return {k: repeated(c, n) for k, c in conditions.items()}


def repeated(condition: Condition, n: int) -> Condition:
    """A single condition n times; n conditions as they are."""
    return condition if len(condition.x) == n else condition.map(lambda x: x.expand(n, *x.shape[1:]))


def check_modality(model: Model, what: str, m: str) -> None:
    """ValueError, which begins with `what`, unless the model has that modality."""
    if m not in model.modalities:
        raise ValueError(f"{what}: this model has no modality {m!r}; it has {', '.join(model.modalities)}")


def require_condition(model: Model, conditions: Mapping[str, Condition], m: str, what: str, how: str) -> None:
    """ValueError unless a modality is a condition; how: the way to make it one."""
    if not set(model.names[m].values()) & set(conditions):
        raise ValueError(f"{what}: there is no condition of that modality, add {how}")


def check_conditions(model: Model, conditions: Mapping[str, Condition], how: str) -> None:
    """ValueError unless the conditions fit the model, and the model can sample the rest.

    how: the way to make the modality {m} a condition.
    """
    for k, condition in conditions.items():
        condition.check(k, model.space)
    whole = {k for k, c in conditions.items() if c.mask is None}
    if whole == set(model.space):
        raise ValueError("every modality is a condition: there is nothing to generate")
    if missing := [k for k in model.space if k not in whole and k not in model.net.outputs]:
        m = model.modality_of(missing[0])
        raise ValueError(f"this model does not generate {m!r}: make it a condition, {how.format(m=m)}")


def _encode_mask(model: Model, m: str, masks: Sequence) -> Tensor | Parts:
    try:
        return model.modalities[m].encode_mask(model.codecs[m], masks)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{m}: {error}") from None


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()
