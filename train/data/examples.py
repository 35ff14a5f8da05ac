"""Encoded examples in memory, cut into batches that are a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import kernels
from ...configs.config import Config
from ...kernels import Draw, Rng
from ...kernels.reference import words_to_index
from ...model.build import Codecs, Names, part_names
from ...model.codecs.base import as_parts
from .dataset import Dataset, InMemory, columns, is_table, labels_of
from .epochs import batch_rows

ENCODED_AT_ONCE = 4096  # values per call of a codec
ON_DEVICE = 2**30  # bytes; smaller data sets are kept on the device that trains


class Examples:
    """One split of a data set, encoded.

    Args:
        x: {process: (N, *shape)}, or (N, M, *shape) for M versions, of which each batch draws one. A NaN marks an
            element without a value: it gets fresh standard normal noise in every batch, so that its noised values carry
            no information.
        names: {modality: {part: name of its process}}.
        present: {process: (N,) bool} where examples lack a modality.
        versions: {modality: (N,) numbers of versions} where there are several.
        raw: the raw values, for evaluations.
    """

    def __init__(
        self,
        x: Mapping[str, Tensor],
        names: Names | None = None,
        present: Mapping[str, Tensor] | None = None,
        versions: Mapping[str, Tensor] | None = None,
        raw: InMemory | None = None,
    ):
        self.x = {k: value if value.is_floating_point() else _narrow(value) for k, value in x.items()}
        self.names = names or {k: {"": k} for k in x}
        self.present, self.versions, self.raw = dict(present or {}), dict(versions or {}), raw
        self.has_gaps = {k for k, value in x.items() if value.is_floating_point() and bool(value.isnan().any())}

    def __len__(self) -> int:
        return len(next(iter(self.x.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.x.values())).device

    @property
    def present_share(self) -> dict[str, float]:
        """{process: share of the examples that have it}."""
        return {k: float(has.float().mean()) for k, has in self.present.items()}

    @property
    def labels(self) -> Mapping[str, np.ndarray]:
        """Annotations of the examples."""
        return {} if self.raw is None else self.raw.labels

    def to(self, device: torch.device) -> Examples:
        """The examples on a device, if they are small enough to stay there."""
        if sum(value.numel() * value.element_size() for value in self.x.values()) > ON_DEVICE:
            return self
        for part in (self.x, self.present, self.versions):
            part.update({k: value.to(device) for k, value in part.items()})
        return self

    def first(self, index: Tensor | slice) -> dict[str, Tensor]:
        """{process: (n, *shape)} of these examples, the first version each, on the CPU."""
        out = {}
        for m, parts in self.names.items():
            for k in parts.values():
                value = self.x[k].cpu()[index]
                value = value[:, 0] if m in self.versions else value
                out[k] = value if value.is_floating_point() else value.long()
        return out

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`, see `batch_rows` and `at`."""
        index = batch_rows(len(self), seed, step, rows, size).to(self.device)
        return self.at(index, torch.arange(rows.start, rows.stop, device=index.device), seed, step)

    def at(self, index: Tensor, samples: Tensor, seed: int, step: int | Tensor) -> dict[str, Tensor]:
        """The examples `index`; `samples` are their positions within batch `step`, which key the random numbers.

        A process that examples lack has a second entry, `presence(process)`, (B,) bool.
        """
        rng, batch = Rng(seed, samples, step), {}
        for m in self.names:
            choice = None if m not in self.versions else self._choose(m, index, rng)
            for k in self.names[m].values():
                value = self.x[k][index] if choice is None else self.x[k][index, choice]
                if k in self.has_gaps:
                    noise = kernels.normal(rng.keys(gap_stream(k), Draw.DATA), value[0].numel()).view(value.shape)
                    value = torch.where(value.isnan(), noise, value)
                batch[k] = value if value.is_floating_point() else value.long()
                if k in self.present:
                    batch[presence(k)] = self.present[k][index]
        return batch

    def _choose(self, m: str, index: Tensor, rng: Rng) -> Tensor:
        """(B,) random versions of a modality; the first one with versions has the stream "data"."""
        stream = "data" if m == next(iter(self.versions)) else f"data {m}"
        words = kernels.reference.random_words(rng.keys(stream, Draw.DATA), 1)[:, 0]
        return words_to_index(words, self.versions[m][index])


def presence(name: str) -> str:
    """The entry of a batch that says which examples have a process."""
    return f"{name}:present"


def encode(dataset: Dataset, config: Config, codecs: Codecs, what: str) -> Examples:
    """A data set as its codecs encode it.

    Args:
        what: the name of the data in errors.

    Raises:
        ValueError: a value without a code, shapes that differ, a modality that no example has; names the modality.
    """
    if not len(dataset):
        raise ValueError(f"{what}: there are no examples")
    names, x, present, versions = part_names(config, codecs), {}, {}, {}
    values = columns(dataset, list(config.modalities))
    for m in config.modalities:
        flat, counts = flatten(values[m])
        if not len(flat):
            raise ValueError(f"{what}: no example has the modality {m}; there are {_present_names(values)}")
        parts = encode_values(codecs[m], flat, f"{what}, {m}")
        for part, name in names[m].items():
            x[name] = spread(parts[part], counts)
            if bool((counts == 0).any()):
                present[name] = counts > 0
        if int(counts.max()) > 1:
            versions[m] = counts.clamp(min=1)
    raw = InMemory(values, labels_of(dataset))
    return Examples(x, names, present, versions, raw)


def flatten(values: Any) -> tuple[Any, Tensor]:
    """All versions of N values in one sequence, and how many each has, (N,) int64; 0: absent."""
    if is_table(values) or isinstance(values, np.ndarray):
        return values, torch.ones(len(values), dtype=torch.int64)
    flat, counts = [], []
    for value in values:
        versions = value if isinstance(value, list) else [] if value is None else [value]
        flat += versions
        counts.append(len(versions))
    if flat and isinstance(flat[0], Mapping):
        from ...model.codecs.table.rows import as_table  # needs pandas, which other modalities do not

        return as_table(flat), torch.tensor(counts)
    return flat, torch.tensor(counts)


def encode_values(codec: Any, values: Any, what: str) -> dict[str, Tensor]:
    """{part: (N, …)} of N values; errors name `what`."""
    # a table is encoded at once: the random numbers of its codec depend on the whole table
    size, encoded = max(len(values), 1) if is_table(values) else ENCODED_AT_ONCE, []
    for start in range(0, len(values), size):
        try:
            encoded.append(as_parts(codec.encode(values[start : start + size])))
        except (ValueError, TypeError) as error:
            where = f"{what}, counted from value {start}" if start else what
            raise ValueError(f"{where}: {error}") from None
    for part in encoded[0]:
        if len(shapes := {tuple(piece[part].shape[1:]) for piece in encoded}) > 1:
            raise ValueError(f"{what}: values of the shapes {' and '.join(map(str, sorted(shapes)))}; one is needed")
    return {part: torch.cat([piece[part] for piece in encoded]) for part in encoded[0]}


def fit_codecs(dataset: Dataset, codecs: Codecs, seed: int, what: str) -> None:
    """Fit the codecs that are not fitted yet.

    Raises:
        ValueError: values that a codec cannot learn from; names the modality.
    """
    unfitted = [m for m, codec in codecs.items() if not codec.is_fitted]
    values = columns(dataset, unfitted) if unfitted else {}
    for m in unfitted:
        flat, _ = flatten(values[m])
        if not len(flat):
            raise ValueError(f"{what}: no example has the modality {m}")
        try:
            codecs[m].fit(flat, seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{what}, {m}: {error}") from None


def spread(x: Tensor, counts: Tensor) -> Tensor:
    """(N, …) or, with several versions, (N, M, …) of the flat values; absent ones are 0, fewer versions repeat."""
    if bool((counts == 1).all()):
        return x
    most = int(counts.max())
    starts = counts.cumsum(0) - counts
    index = starts[:, None] + torch.arange(most) % counts.clamp(min=1)[:, None]
    out = x[index.clamp(max=len(x) - 1)]
    out[counts == 0] = 0
    return out if most > 1 else out[:, 0]


def _narrow(tokens: Tensor) -> Tensor:
    """Tokens in the smallest of int16 and int32 that holds them."""
    fits = tokens.numel() == 0 or int(tokens.max()) < 2**15
    return tokens.to(torch.int16 if fits else torch.int32)


def gap_stream(name: str) -> str:
    """The random stream that fills elements without a value; "fill" for the numbers of a table."""
    return "fill" if name == "num" else f"fill {name}"


def _present_names(values: Mapping[str, Sequence]) -> str:
    there = [m for m, column in values.items() if is_table(column) or any(value is not None for value in column)]
    return ", ".join(there) or "none"
