"""Conditions from the command line: captions, images, masks, prompts from a file, rows of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion import Masked
from ..model.codecs.characters import MASKED, CharCodec
from .condition import Condition
from .pipeline import Pipeline


class ImageTextRows(Protocol):
    """Encoded rows of a data set, see `train.data.pairs.Pairs`: images (N, C, S, S) and captions (N, M, L)."""

    @property
    def names(self) -> tuple[str, str]:
        """The image and the text modality."""
        ...

    @property
    def images(self) -> Tensor: ...

    @property
    def captions(self) -> Tensor: ...


ReadRows = Callable[[Pipeline, str, str, int | None], ImageTextRows]  # of (pipeline, data, split, limit)


@dataclasses.dataclass(frozen=True)
class ConditionSource:
    """The source of conditions; several values of one modality are several conditions.

    Args:
        values: (modality, value): a caption, in which ▯ stands for a masked token, or the path of an image;
            None takes it from `data`.
        noise_level: {modality: noise time of the condition}, a number as text.
        mask: {modality: path of a black and white image}: white pixels are the condition, black ones are sampled.
        prompts: a JSON file {modality: [captions]}.
        data, split: a packed data set (or an .npz, or the name of a bundled one) and which part of it.
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


@dataclasses.dataclass(frozen=True)
class Conditions:
    """{modality: R conditions} (empty: joint sampling), and how many samples each of the R gets."""

    conditions: dict[str, Condition]
    copies: int

    @property
    def total(self) -> int:
        """Number of samples."""
        return self.copies * (len(next(iter(self.conditions.values())).x) if self.conditions else 1)

    def of_samples(self, samples: range) -> dict[str, Condition]:
        """The conditions of these samples; sample i has condition i // copies."""
        index = torch.arange(samples.start, samples.stop) // self.copies
        return {m: c.map(lambda x: x[index]) for m, c in self.conditions.items()}

    def digest(self) -> dict[str, str]:
        """{modality: SHA-256 of its conditions}: differs between requests whose files have changed."""
        return {m: _sha256(*([c.x] if c.mask is None else [c.x, c.mask])) for m, c in self.conditions.items()}


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
    if source.limit is not None and (source.limit < 1 or not many):
        raise ValueError("--limit counts prompts or rows of --data, and is at least 1")
    if source.prompts is not None and (source.data is not None or source.values):
        raise ValueError("--prompts, --data and --condition NAME=VALUE: one source of conditions at a time")
    values = _values(pipeline, source)
    if source.data is not None:
        conditions = {m: Condition(x) for m, x in _rows(pipeline, source, read_rows).items()}
    else:
        conditions = _encode(pipeline, source, values)
    captions = [m for m in conditions if m in pipeline.texts]
    if not captions and (source.context_limit is not None or source.repeat_text != 1):
        raise ValueError("--context-limit and --repeat-text need a caption as a condition")
    for m, path in source.mask.items():
        conditions[m] = _with_mask(pipeline, conditions, m, path)
    for m, text in source.noise_level.items():
        t = _time(pipeline, conditions, m, text)
        conditions[m] = dataclasses.replace(conditions[m], t=t)
    for m, condition in conditions.items():
        condition.check(m, pipeline.space)
    if len({len(c.x) for c in conditions.values()}) > 1:
        raise ValueError("conditions of different modalities differ in number")
    if set(conditions) == set(pipeline.space) and all(c.mask is None for c in conditions.values()):
        raise ValueError("every modality is a condition: there is nothing to generate")
    return Conditions(conditions, n)


def _values(pipeline: Pipeline, source: ConditionSource) -> dict[str, list[str]]:
    """{modality: raw values} of --condition and --prompts."""
    if source.prompts is not None:
        return _prompts(pipeline, source.prompts, source.limit)
    values: dict[str, list[str]] = {}
    for m, value in source.values:
        check_modality(pipeline, "--condition", m)
        if source.data is None and value is None:
            raise ValueError(f"--condition {m!r} is not of the form NAME=VALUE (a name alone takes rows of --data)")
        if source.data is not None and value is not None:
            raise ValueError(f"--condition {m}={value}: with --data, give the name alone")
        values.setdefault(m, []).append(value)
    if len({len(v) for v in values.values()}) > 1:
        counts = ", ".join(f"{len(v)} of {m}" for m, v in values.items())
        raise ValueError(f"--condition: give equally many values of each modality, got {counts}")
    return values


def _prompts(pipeline: Pipeline, path: Path, limit: int | None) -> dict[str, list[str]]:
    """The captions of a JSON file, for the text modalities that it names; other keys are ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--prompts: {str(path)!r} not found") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts: {path} is not readable JSON ({error})") from None
    shape = f'{{"{(pipeline.texts or ["text"])[0]}": ["a caption", …]}}'
    names = [m for m in pipeline.texts if isinstance(content, dict) and m in content]
    if not names:
        raise ValueError(f"--prompts: {path} should look like {shape}")
    values = {m: content[m] for m in names}
    for prompts in values.values():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"--prompts: {path} should look like {shape}, one caption at least")
    if len({len(v) for v in values.values()}) > 1:
        raise ValueError(f"--prompts: {path} has lists of different length")
    return {m: prompts[:limit] for m, prompts in values.items()}


def _encode(pipeline: Pipeline, source: ConditionSource, values: dict[str, list[str]]) -> dict[str, Condition]:
    """{modality: R conditions} of raw values."""
    conditions = {}
    for m, raw in values.items():
        if m in pipeline.images:
            conditions[m] = Condition(torch.cat([pipeline.codecs[m].read(path) for path in raw]))
            continue
        tokens = encode_captions(pipeline, m, raw, source.context_limit, source.repeat_text)
        mask_token = pipeline.config.modalities[m].states
        mask = tokens != mask_token if any(MASKED in caption for caption in raw) else None
        if mask is not None and not isinstance(pipeline.space[m], Masked):
            raise ValueError(f"--condition {m}: ▯ needs a modality under masked diffusion, {m!r} is not")
        conditions[m] = Condition(tokens, mask=mask)
    return conditions


def encode_captions(
    pipeline: Pipeline, m: str, captions: Sequence[str], limit: int | None = None, repeat: int = 1
) -> Tensor:
    """Captions → int64 (N, L): each repeated `repeat` times, cut after `limit` tokens, padded to the full length.

    The sign ▯ becomes the mask token.
    """
    codec, settings = pipeline.codecs[m], pipeline.config.modalities[m]
    if repeat < 1:
        raise ValueError(f"--repeat-text must be at least 1, got {repeat}")
    length = _limit(limit, settings.length)
    if repeat > 1:
        captions = [" ".join([caption] * repeat) for caption in captions]
    if isinstance(codec, CharCodec) and (repeat > 1 or limit is not None):
        captions = [caption[:length] for caption in captions]  # a TokenizerCodec truncates by itself
    codec = dataclasses.replace(codec, length=length)
    masked = any(MASKED in caption for caption in captions)
    tokens = codec.encode_masked(captions) if masked else codec.encode(captions)
    return torch.nn.functional.pad(tokens, (0, settings.length - length), value=settings.pad)


def _rows(pipeline: Pipeline, source: ConditionSource, read_rows: ReadRows | None) -> dict[str, Tensor]:
    """{modality: (R, *shape)} of the rows of a data set; of several captions the first."""
    names = list(dict.fromkeys(m for m, _ in source.values))
    if not names:
        raise ValueError("--data needs --condition NAME: which modality of its rows is the condition?")
    if source.repeat_text != 1:
        raise ValueError("--repeat-text works on captions, and the rows of --data are tokens: leave it out")
    if read_rows is None:
        raise ValueError("rows of a data set need a function that reads them (read_rows)")
    part = read_rows(pipeline, source.data, source.split, source.limit)
    image, text = part.names
    rows = {image: part.images[: source.limit], text: part.captions[: source.limit, 0].clone()}
    length = _limit(source.context_limit, rows[text].shape[1])
    rows[text][:, length:] = pipeline.config.modalities[text].pad
    return {m: rows[m] for m in names}


def check_modality(pipeline: Pipeline, option: str, m: str) -> None:
    """ValueError, naming the option, unless the model has that modality."""
    if m not in pipeline.space:
        raise ValueError(f"{option}: this model has no modality {m!r}; it has {', '.join(pipeline.space)}")


def _with_mask(pipeline: Pipeline, conditions: dict[str, Condition], m: str, path: str) -> Condition:
    """The condition of an image inside the white part of a mask image."""
    check_modality(pipeline, "--mask", m)
    if m not in pipeline.images:
        raise ValueError(f"--mask {m}: masks are for images; in a caption, write ▯ for every masked token")
    if m not in conditions:
        raise ValueError(f"--mask {m}: there is no condition of that modality, add --condition {m}=…")
    mask = pipeline.codecs[m].read_mask(path)
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(f"--mask {m}: {path} is all {'white' if mask.all() else 'black'}: leave the option out")
    return dataclasses.replace(conditions[m], mask=mask.expand(conditions[m].x.shape))


def _time(pipeline: Pipeline, conditions: dict[str, Condition], m: str, text: str) -> float:
    """The time of --noise-level."""
    check_modality(pipeline, "--noise-level", m)
    if m not in conditions:
        raise ValueError(f"--noise-level {m}: there is no condition of that modality, add --condition {m}=…")
    try:
        time = float(text)
    except ValueError:
        raise ValueError(f"--noise-level {m}: {text!r} is not a number") from None
    if not 0.0 <= time <= 1.0:
        raise ValueError(f"--noise-level {m}: a noise time is in [0, 1], got {text}")
    return time


def _limit(limit: int | None, length: int) -> int:
    if limit is not None and not 1 <= limit <= length:
        raise ValueError(f"--context-limit must lie in 1 … {length}, got {limit}")
    return length if limit is None else limit


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()
