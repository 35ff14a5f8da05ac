"""Conditions from the command line: values, masks, prompts from a file, rows of a data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .condition import Condition
from .pipeline import Pipeline
from .raw_conditions import (
    Conditions,
    at_time,
    check_conditions,
    check_modality,
    encode_condition,
    exact,
    inside,
    require_condition,
)


class Rows(Protocol):
    """Encoded rows of a data set, see `train.data.examples.Examples`."""

    present: Mapping[str, Tensor]

    def __len__(self) -> int: ...

    def first(self, index: Tensor) -> dict[str, Tensor]: ...


ReadRows = Callable[[Pipeline, str, str, int | None], Rows]  # of (pipeline, data, split, limit)


@dataclasses.dataclass(frozen=True)
class ConditionSource:
    """The source of conditions; several values of one modality are several conditions.

    Args:
        values: (modality, value as `Modality.read` takes it); None takes it from `data`.
        noise_level: {modality or one of its processes: noise time of the condition}, a number as text.
        mask: {modality: path that `Modality.read_mask` takes}: what is known of the condition; the rest is sampled.
        prompts: a JSON file {modality: [captions]}.
        data, split: a data set, as `data.source` of a config, and which part of it.
        limit: only so many of the prompts or rows.
        context_limit: at most so many tokens of a caption are used, the rest is padding.
        repeat_text: how often each caption is repeated in its context, as far as it fits.
    """

    values: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    noise_level: dict[str, str] = dataclasses.field(default_factory=dict)
    mask: dict[str, str] = dataclasses.field(default_factory=dict)
    prompts: Path | None = None
    data: str | None = None
    split: str = "test"
    limit: int | None = None
    context_limit: int | None = None
    repeat_text: int = 1

    def as_dict(self) -> dict:
        """For manifests."""
        return dataclasses.asdict(self)


def read_conditions(
    pipeline: Pipeline, source: ConditionSource, n: int | None, read_rows: ReadRows | None = None
) -> Conditions:
    """All conditions, encoded; n samples of each (default: 16, but 1 of each prompt or row).

    read_rows: reads the rows of `source.data`, see `train.data.load.read_rows`.

    Raises:
        ValueError: anything wrong with the conditions; names the option.
    """
    many = source.prompts is not None or source.data is not None
    n = (1 if many else 16) if n is None else n
    if n < 1:
        raise ValueError(f"-n must be at least 1, got {n}")
    _check_options(source, many)
    is_data = source.data is not None
    values = {} if is_data else _values(pipeline, source)
    conditions = _of_rows(pipeline, source, read_rows) if is_data else _encode(pipeline, source, values)
    captions = [k for k in conditions if pipeline.modalities[pipeline.modality_of(k)].prompts]
    if not captions and (source.context_limit is not None or source.repeat_text != 1):
        raise ValueError("--context-limit and --repeat-text need a caption as a condition")
    for m, path in source.mask.items():
        conditions |= _with_mask(pipeline, conditions, m, path)
    for name, text in source.noise_level.items():
        conditions |= _noised(pipeline, conditions, name, text)
    if len({len(c.x) for c in conditions.values()}) > 1:
        raise ValueError("conditions of different modalities differ in number")
    check_conditions(pipeline, conditions, "--condition {m}=…")
    return Conditions(conditions, n, exact(pipeline, conditions, values, source.mask))


def processes_of(pipeline: Pipeline, option: str, name: str) -> list[str]:
    """The processes that an option NAME=… means: all of a modality, or the one of that name."""
    if name not in pipeline.names and name in pipeline.space:
        return [name]
    check_modality(pipeline, option, name)
    return list(pipeline.names[name].values())


def _check_options(source: ConditionSource, many: bool) -> None:
    """ValueError for options that do not go together."""
    if source.limit is not None and (source.limit < 1 or not many):
        raise ValueError("--limit counts prompts or rows of --data, and is at least 1")
    if source.prompts is not None and (source.data is not None or source.values):
        raise ValueError("--prompts, --data and --condition NAME=VALUE: one source of conditions at a time")
    if source.repeat_text < 1:
        raise ValueError(f"--repeat-text must be at least 1, got {source.repeat_text}")


def _values(pipeline: Pipeline, source: ConditionSource) -> dict[str, list]:
    """{modality: raw values} of --condition NAME=VALUE and --prompts."""
    values = {}
    for m, texts in _texts(pipeline, source).items():
        try:
            values[m] = [pipeline.modalities[m].read(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"{_option(source)} {m}: {error}") from None
    return values


def _encode(pipeline: Pipeline, source: ConditionSource, values: Mapping[str, list]) -> dict[str, Condition]:
    """{process: R conditions} of raw values."""
    conditions: dict[str, Condition] = {}
    for m, raw in values.items():
        is_text = pipeline.modalities[m].prompts
        options = {"limit": source.context_limit, "repeat": source.repeat_text} if is_text else {}
        conditions |= encode_condition(pipeline, m, raw, f"{_option(source)} {m}", **options)
    return conditions


def _option(source: ConditionSource) -> str:
    return "--condition" if source.prompts is None else "--prompts"


def _texts(pipeline: Pipeline, source: ConditionSource) -> dict[str, list[str]]:
    """{modality: values as texts} of --condition and --prompts."""
    if source.prompts is not None:
        return _prompts(pipeline, source.prompts, source.limit)
    values: dict[str, list[str]] = {}
    for m, value in source.values:
        check_modality(pipeline, "--condition", m)
        if value is None:
            raise ValueError(f"--condition {m!r} is not of the form NAME=VALUE (a name alone takes rows of --data)")
        values.setdefault(m, []).append(value)
    if len({len(v) for v in values.values()}) > 1:
        counts = ", ".join(f"{len(v)} of {m}" for m, v in values.items())
        raise ValueError(f"--condition: give equally many values of each modality, got {counts}")
    return values


def _prompts(pipeline: Pipeline, path: Path, limit: int | None) -> dict[str, list[str]]:
    """The captions of a JSON file, for the modalities of captions that it names; other keys are ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--prompts: {str(path)!r} not found") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts: {path} is not readable JSON ({error})") from None
    captions = [m for m, modality in pipeline.modalities.items() if modality.prompts]
    if not captions:
        raise ValueError(f"--prompts: this model has no captions; it has {', '.join(pipeline.modalities)}")
    shape = f'{{"{captions[0]}": ["a caption", …]}}'
    names = [m for m in captions if isinstance(content, dict) and m in content]
    if not names:
        raise ValueError(f"--prompts: {path} should look like {shape}")
    values = {m: content[m] for m in names}
    for prompts in values.values():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"--prompts: {path} should look like {shape}, one caption at least")
    if len({len(v) for v in values.values()}) > 1:
        raise ValueError(f"--prompts: {path} has lists of different length")
    return {m: prompts[:limit] for m, prompts in values.items()}


def _of_rows(pipeline: Pipeline, source: ConditionSource, read_rows: ReadRows | None) -> dict[str, Condition]:
    """{process: R conditions} of the rows of a data set that have these modalities; of several versions the first."""
    for m, value in source.values:
        check_modality(pipeline, "--condition", m)
        if value is not None:
            raise ValueError(f"--condition {m}={value}: with --data, give the name alone")
    names = list(dict.fromkeys(m for m, _ in source.values))
    if not names:
        raise ValueError("--data needs --condition NAME: which modality of its rows is the condition?")
    if source.repeat_text != 1:
        raise ValueError("--repeat-text works on captions, and the rows of --data are tokens: leave it out")
    if read_rows is None or source.data is None:
        raise ValueError("rows of a data set need a function that reads them (read_rows)")
    rows = read_rows(pipeline, source.data, source.split, source.limit)
    has = torch.ones(len(rows), dtype=torch.bool)
    for k in [k for m in names for k in pipeline.names[m].values() if k in rows.present]:
        has &= rows.present[k].cpu()
    if not has.any():
        raise ValueError(f"--data {source.data}: no row of its {source.split} part has {' and '.join(names)}")
    x = rows.first(has.nonzero()[: source.limit, 0])
    processes = [(m, k) for m in names for k in pipeline.names[m].values()]
    return {k: Condition(pipeline.modalities[m].shorten(_filled(x[k]), source.context_limit)) for m, k in processes}


def _filled(x: Tensor) -> Tensor:
    """Noise for elements without a value (NaN), as in training."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x)


def _with_mask(pipeline: Pipeline, conditions: dict[str, Condition], m: str, path: str) -> dict[str, Condition]:
    """The conditions of a modality inside the mask of a file."""
    check_modality(pipeline, "--mask", m)
    require_condition(pipeline, conditions, m, f"--mask {m}", f"--condition {m}=…")
    try:
        mask = pipeline.modalities[m].read_mask(pipeline.codecs[m], path)
    except ValueError as error:
        raise ValueError(f"--mask {m}: {error}") from None
    parts = list(mask.values()) if isinstance(mask, dict) else [mask]
    for what, value in (("all", True), ("nothing", False)):
        if all(bool((part == value).all()) for part in parts):
            raise ValueError(f"--mask {m}: {path} says that {what} is known (white or true): leave the option out")
    return inside(pipeline, conditions, m, mask, f"--mask {m}")


def _noised(pipeline: Pipeline, conditions: dict[str, Condition], name: str, text: str) -> dict[str, Condition]:
    """The conditions of a modality, or of one of its processes, at a noise time."""
    processes = processes_of(pipeline, "--noise-level", name)
    if not set(processes) & set(conditions):
        m = pipeline.modality_of(processes[0])
        require_condition(pipeline, {}, m, f"--noise-level {name}", f"--condition {m}=…")
    return at_time(conditions, processes, text, f"--noise-level {name}")
