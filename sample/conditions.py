"""What is known before sampling starts: captions, pictures, prompts from a file, rows of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..model.codecs.characters import CharCodec
from . import Given
from .pipeline import Pipeline

ReadRows = Callable[..., object]  # (pipeline, data, split, limit) → rows with `names`, `images` and `captions`


@dataclasses.dataclass(frozen=True)
class Source:
    """Where conditions come from; several values of one modality are several conditions.

    Args:
        given: (modality, value): a caption or the path of a picture; None takes it from `data`.
        level: {modality: noise level up to which it is known}, a number as text.
        prompts: a JSON file {modality: [captions]}.
        data, split: a packed data set (or an .npz, or the name of a bundled one) and which part of it.
        limit: only so many of the prompts or rows.
        context_limit: at most so many tokens of a caption are given, the rest is padding.
        repeat_text: how often each caption is written into its context, as far as it fits.
    """

    given: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    level: dict[str, str] = dataclasses.field(default_factory=dict)
    prompts: Path | None = None
    data: str | None = None
    split: str = "test"
    limit: int | None = None
    context_limit: int | None = None
    repeat_text: int = 1


@dataclasses.dataclass(frozen=True)
class Conditions:
    """{modality: Given} of R conditions each (none: joint sampling), and how many samples each gets."""

    given: dict[str, Given]
    copies: int

    @property
    def total(self) -> int:
        """Number of samples."""
        return self.copies * (len(next(iter(self.given.values())).x) if self.given else 1)

    def rows(self, samples: range) -> dict[str, Given]:
        """The conditions of these samples; sample i has condition i // copies."""
        index = torch.arange(samples.start, samples.stop) // self.copies
        return {m: dataclasses.replace(g, x=g.x[index]) for m, g in self.given.items()}

    def digest(self) -> dict[str, str]:
        """{modality: SHA-256 of its conditions}: tells requests apart whose files changed."""
        return {m: hashlib.sha256(g.x.contiguous().numpy().tobytes()).hexdigest() for m, g in self.given.items()}


def conditions(system: Pipeline, source: Source, n: int | None, read_rows: ReadRows | None = None) -> Conditions:
    """Everything given, encoded; n samples of each condition (default: 16, but 1 of each prompt or row).

    read_rows: reads the rows of `source.data`.

    Raises:
        ValueError: anything wrong with what is given; names the option.
    """
    many = source.prompts is not None or source.data is not None
    n = (1 if many else 16) if n is None else n
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    if source.limit is not None and (source.limit < 1 or not many):
        raise ValueError("--limit counts prompts or rows of --data, and is at least 1")
    if source.prompts is not None and (source.data is not None or source.given):
        raise ValueError("--prompts, --data and --given NAME=VALUE: one source of conditions at a time")
    values = _values(system, source)
    if source.data is not None:
        known = _rows(system, source, read_rows)
    else:
        known = _encode(system, source, values)
    captions = [m for m in known if m in system.texts]
    if not captions and (source.context_limit is not None or source.repeat_text != 1):
        raise ValueError("--context-limit and --repeat-text need a caption that is given")
    system.space.check(known)
    if set(known) == set(system.space):
        raise ValueError("every modality is given: there is nothing to generate")
    levels = {m: _level(system, known, m, text) for m, text in source.level.items()}
    return Conditions({m: Given(x, levels.get(m, 0.0)) for m, x in known.items()}, n)


def _values(system: Pipeline, source: Source) -> dict[str, list[str]]:
    """{modality: raw values} of --given and --prompts."""
    if source.prompts is not None:
        return _prompts(system, source.prompts, source.limit)
    values: dict[str, list[str]] = {}
    for m, value in source.given:
        known(system, "--given", m)
        if (value is None) != (source.data is not None):
            if value is None:
                raise ValueError(f"--given {m!r} is not of the form NAME=VALUE (a name alone takes rows of --data)")
            raise ValueError(f"--given {m}={value}: with --data, give the name alone")
        values.setdefault(m, []).append(value)
    if len({len(v) for v in values.values()}) > 1:
        counts = ", ".join(f"{len(v)} of {m}" for m, v in values.items())
        raise ValueError(f"--given: give equally many values of each modality, got {counts}")
    return values


def _prompts(system: Pipeline, path: Path, limit: int | None) -> dict[str, list[str]]:
    """The captions of a JSON file, for the text modalities it names; other keys are left alone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--prompts: {str(path)!r} not found") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts: {path} is not readable JSON ({error})") from None
    shape = f'{{"{(system.texts or ["text"])[0]}": ["a caption", …]}}'
    names = [m for m in system.texts if isinstance(content, dict) and m in content]
    if not names:
        raise ValueError(f"--prompts: {path} should look like {shape}")
    values = {m: content[m] for m in names}
    for prompts in values.values():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"--prompts: {path} should look like {shape}, one caption at least")
    if len({len(v) for v in values.values()}) > 1:
        raise ValueError(f"--prompts: {path} has lists of different length")
    return {m: prompts[:limit] for m, prompts in values.items()}


def _encode(system: Pipeline, source: Source, values: dict[str, list[str]]) -> dict[str, Tensor]:
    """{modality: (R, *shape)} of raw values."""
    encoded = {}
    for m, raw in values.items():
        if m in system.images:
            encoded[m] = torch.cat([system.codecs[m].read(path) for path in raw])
        else:
            encoded[m] = encode_captions(system, m, raw, source.context_limit, source.repeat_text)
    return encoded


def encode_captions(system: Pipeline, m: str, captions: Sequence[str], limit: int | None = None, repeat: int = 1):
    """Captions → int64 (N, L): each written `repeat` times, cut after `limit` tokens, padded to the full length."""
    codec, settings = system.codecs[m], system.config.modalities[m]
    if repeat < 1:
        raise ValueError(f"--repeat-text must be at least 1, got {repeat}")
    length = _limit(limit, settings.length)
    if repeat > 1:
        captions = [" ".join([caption] * repeat) for caption in captions]
    if isinstance(codec, CharCodec) and (repeat > 1 or limit is not None):
        captions = [caption[:length] for caption in captions]  # a TokenizerCodec cuts by itself
    tokens = dataclasses.replace(codec, length=length).encode(captions)
    return torch.nn.functional.pad(tokens, (0, settings.length - length), value=settings.pad)


def _rows(system: Pipeline, source: Source, read_rows: ReadRows) -> dict[str, Tensor]:
    """{modality: (R, *shape)} of a data set's rows; of several captions the first."""
    names = list(dict.fromkeys(m for m, _ in source.given))
    if not names:
        raise ValueError("--data needs --given NAME: which part of its rows is known?")
    if source.repeat_text != 1:
        raise ValueError("--repeat-text works on captions, and the rows of --data are tokens: leave it out")
    part = read_rows(system, source.data, source.split, source.limit)
    image, text = part.names
    rows = {image: part.images[: source.limit], text: part.captions[: source.limit, 0].clone()}
    length = _limit(source.context_limit, rows[text].shape[1])
    rows[text][:, length:] = system.config.modalities[text].pad
    return {m: rows[m] for m in names}


def known(system: Pipeline, option: str, m: str) -> None:
    """ValueError, naming the option, unless the model has that modality."""
    if m not in system.space:
        raise ValueError(f"{option}: this model has no modality {m!r}; it has {', '.join(system.space)}")


def _limit(limit: int | None, length: int) -> int:
    if limit is not None and not 1 <= limit <= length:
        raise ValueError(f"--context-limit must lie in 1 … {length}, got {limit}")
    return length if limit is None else limit


def _level(system: Pipeline, given: dict, m: str, text: str) -> float:
    known(system, "--level", m)
    if m not in given:
        raise ValueError(f"--level {m}: nothing of that modality is given, add --given {m}=…")
    try:
        level = float(text)
    except ValueError:
        raise ValueError(f"--level {m}: {text!r} is not a number") from None
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"--level {m}: a noise level lies in [0, 1], got {text}")
    return level
