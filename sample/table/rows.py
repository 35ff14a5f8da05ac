"""Rows from a table model: unconditional, given values or ranges of columns, balanced, or with empty cells filled in.

Nothing is rejected. A given value is a cell that is known from the start. A range on a column with tokens is drawn
first, by one evaluation of the network with the states outside the range forbidden, so it follows the model's
distribution under the other conditions; where the range leaves part of a continuous column, the value is drawn from
the training quantiles within it. The rest of the row is then sampled as usual.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng
from ...model.codecs.table.codec import MISSING, RARE, REGULAR, ColumnCodec
from ...model.codecs.table.columns import dates
from .. import sample
from .pipeline import TablePipeline

Condition = object  # a value, or (low, high) with None for an open end
ROWS = 4096  # of a batch by default
GPU_ROWS = 65536  # on a GPU, whose time hardly depends on the rows of so small a network
GPU_LOGITS = 2**29  # numbers in a batch's logits on a GPU, at most: 2 GiB


@dataclasses.dataclass
class Cells:
    """What is known of n rows: tokens (n, C) with the mask where unknown, scores (n, C) with `known` (n, C) bool."""

    tokens: Tensor
    scores: Tensor
    known: Tensor

    def rows(self, index: Tensor) -> Cells:
        return Cells(self.tokens[index], self.scores[index], self.known[index])

    def to(self, device: torch.device) -> Cells:
        return Cells(self.tokens.to(device), self.scores.to(device), self.known.to(device))


@dataclasses.dataclass
class Pin:
    """A column held to a range: its allowed states (K,) bool if there is a choice, and its part of the curve."""

    codec: ColumnCodec
    allowed: Tensor | None
    span: tuple[float, float] | None


@dataclasses.dataclass
class Generator:
    """Samples a table system in chunks of constant size.

    Args:
        steps: network evaluations of a row; default the config's.
        seed: row i of a seed draws the same random numbers whatever n.
    """

    system: TablePipeline
    steps: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self):
        self.codec, self.space = self.system.codec, self.system.space
        self.device = next(self.system.net.parameters()).device

    def unknown(self, n: int) -> Cells:
        """n rows of which nothing is known."""
        mask = self.space["cat"].mask_id if "cat" in self.space else 0
        numbers = len(self.codec.numbers)
        return Cells(
            torch.full((n, len(self.codec.tokens)), mask),
            torch.zeros(n, numbers),
            torch.zeros(n, numbers, dtype=torch.bool),
        )

    def table(self, n: int, where: Mapping[str, Condition] | None = None, balance: str | None = None) -> pd.DataFrame:
        """n new rows; see the module's text.

        Raises:
            ValueError: an unknown column, a value the column does not have, an empty range, a column to balance that
                is not categorical.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        cells, where = self.unknown(n), dict(where or {})
        if balance is not None:
            if balance in where:
                raise ValueError(f"column {balance!r} is balanced and given at once")
            self._balance(cells, balance)
        pins = []
        for name, condition in where.items():
            codec = self._column(name)
            allowed, span = allowed_states(codec, condition)
            if codec.states and allowed.sum() == 1:
                cells.tokens[:, self.codec.tokens.index(name)] = int(np.flatnonzero(allowed)[0])
            ranged = codec.states and allowed.sum() > 1
            pins.append(Pin(codec, torch.from_numpy(allowed) if ranged else None, span))
        tokens, scores = self.fill(cells, pins)
        table = self.codec.decode(tokens, scores, self.seed)
        for name, condition in where.items():  # a single given number comes back as it was given
            if self.codec.columns[name].numeric and not isinstance(condition, tuple) and not pd.isna(condition):
                value = self.codec.columns[name].to_numbers(pd.Series([condition]))
                table[name] = self.codec.columns[name].from_numbers(np.repeat(value, n))
        return table

    def impute(self, table: pd.DataFrame, draw: int = 0, cells: Cells | None = None) -> pd.DataFrame:
        """The table with its empty cells drawn given the filled ones; filled cells are those of the input."""
        cells = self.cells_of(table) if cells is None else cells
        index, table = table.index, table.reset_index(drop=True)  # an index may repeat itself
        incomplete = torch.tensor(table.isna().to_numpy().any(1))
        filled = table.copy().set_axis(index)
        if not incomplete.any():
            return filled
        again = dataclasses.replace(self, seed=self.seed + 1_000_003 * draw)
        tokens, scores = again.fill(cells.rows(incomplete), [], self.never_missing())
        made = self.codec.decode(tokens, scores, again.seed)
        made.index = np.flatnonzero(incomplete.numpy())
        for name in self.codec.columns:
            empty = table.loc[made.index, name].isna()
            if empty.any() and self.codec.columns[name].column.kind != "identifier":
                filled[name] = put(table[name], made.loc[empty, name]).set_axis(index)
        return filled

    def never_missing(self) -> Tensor | None:
        """(C, K) bool: the states that mean an empty cell, which no filled cell may take."""
        if "cat" not in self.space:
            return None
        forbidden = torch.zeros(len(self.codec.tokens), self.space["cat"].states, dtype=torch.bool)
        for c, name in enumerate(self.codec.tokens):
            if (state := self.codec.columns[name].state(MISSING)) >= 0 and len(self.codec.columns[name].states) > 1:
                forbidden[c, state] = True
        return forbidden

    def cells_of(self, table: pd.DataFrame) -> Cells:
        """The known cells of a table."""
        tokens, scores = self.codec.encode(table)
        cells = self.unknown(len(table))
        for c, name in enumerate(self.codec.tokens):
            known = torch.tensor(table[name].notna().to_numpy())
            cells.tokens[:, c] = torch.where(known, tokens[:, c], cells.tokens[:, c])
        for c, name in enumerate(self.codec.numbers):
            cells.known[:, c] = torch.tensor(table[name].notna().to_numpy())
        # where a filled cell has no number (a spike), noise stands in as in training
        noise = kernels.normal(Rng.for_batch(self.seed, len(table)).keys("fill", Draw.DATA), max(scores.shape[1], 1))
        cells.scores = torch.where(scores.isnan(), noise[:, : scores.shape[1]], scores)
        return cells

    def fill(self, cells: Cells, pins: list[Pin], forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All cells of the rows, drawn where unknown.

        Args:
            pins: columns to draw first, within their ranges.
            forbidden: (C, K) bool, states that no cell may take.
        """
        n = len(cells.tokens)
        chunk, parts = self.batch_rows(n), []
        for first in range(0, n, chunk):
            index = torch.arange(first, first + chunk).clamp(max=n - 1)
            part = cells.rows(index).to(self.device)
            for pin in pins:
                self._draw_pin(part, pin, Rng.for_batch(self.seed, chunk, first, self.device))
            parts.append(self.fill_chunk(part, first, forbidden))
        tokens, scores = (torch.cat([part[i] for part in parts])[:n].cpu() for i in (0, 1))
        return tokens, scores

    def batch_rows(self, n: int) -> int:
        """How many of n rows are drawn at a time: what the config says, else a function of the device's type, the table
        and n alone, so that the same command draws the same rows."""
        if self.system.config.sample.batch_size is not None:
            return min(self.system.config.sample.batch_size, n)
        if self.device.type == "cpu":
            return min(ROWS, n)
        logits = len(self.codec.tokens) * max(self.codec.states, default=0)
        return min(GPU_ROWS, max(ROWS, GPU_LOGITS // max(logits, 1)), n)

    def shares(self, first: int, n: int) -> tuple[Tensor, Tensor] | None:
        """Of rows first, …: (n, C) shares of the numbers and of the tokens, if they are spread evenly over the rows.

        A scrambled Sobol sequence: every point is uniform by itself and, as all draws, a function of (seed, row).
        """
        if self.system.config.noise != "sobol":
            return None
        columns = [len(self.codec.numbers), len(self.codec.tokens)]
        points = torch.quasirandom.SobolEngine(sum(columns), scramble=True, seed=self.seed).fast_forward(first)
        # points are multiples of 2⁻³⁰; their middles are never 0
        return (points.draw(n, dtype=torch.float64) + 2.0**-31).split(columns, 1)

    def fill_chunk(
        self, cells: Cells, first: int, forbidden: Tensor | None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows first, … of a table; `noise` (n, C) starts the scores instead of drawn numbers."""
        init = {"cat": cells.tokens} if "cat" in self.space else {}
        samplers, shares = self.system.samplers, self.shares(first, len(cells.tokens))
        if shares is not None:
            noise = torch.special.ndtri(shares[0]).float().to(self.device) if noise is None else noise
            if "cat" in self.space:
                samplers["cat"] = dataclasses.replace(samplers["cat"], shares=shares[1])
        if noise is not None and "num" in self.space:
            init["num"] = noise
        out = sample(
            self.net_for(cells, forbidden),
            self.space,
            n=len(cells.tokens),
            steps=self.steps or self.system.config.sample.steps,
            seed=self.seed,
            samplers=samplers,
            engine=self.system.config.engine,
            first=first,
            chunk=len(cells.tokens),
            init=init,
            progress=self.progress,
            device=self.device,
        )
        if "num" not in out:
            return out["cat"], cells.scores
        columns = zip(self.codec.numbers, out["num"].unbind(1), strict=True)
        drawn = torch.stack([self.codec.columns[name].quantiles.stretch(x) for name, x in columns], 1)
        scores = torch.where(cells.known, cells.scores, drawn)
        return out.get("cat", cells.tokens), scores

    def net_for(self, cells: Cells, forbidden: Tensor | None = None):
        """The network with known numbers held clean and forbidden states closed."""
        net, given = self.system.net, {}
        if "num" in self.space and bool(cells.known.any()):
            if net.known is None:
                raise ValueError("given numbers need a model trained with them: fit it with known=0.25 or so")
            given = {"num": cells.known}
        closed = None
        if forbidden is not None:
            extra = self.space["cat"].mask_logit is not None
            closed = torch.nn.functional.pad(forbidden.to(self.device), (0, int(extra)))
        if not given and closed is None:
            return net

        def call(x, t, mask=None, outputs=None):
            if given:
                x = {**x, "num": torch.where(cells.known, cells.scores, x["num"])}
            out = net(x, t, mask, outputs, given=given)
            if closed is not None and "cat" in out:
                out["cat"] = out["cat"].masked_fill(closed, -math.inf)
            return out

        return call

    @torch.no_grad()
    def _draw_pin(self, cells: Cells, pin: Pin, rng: Rng) -> None:
        """Draw one column within its range, with all that is unknown at pure noise."""
        name, regular = pin.codec.name, torch.ones(len(cells.tokens), dtype=torch.bool, device=self.device)
        if pin.allowed is not None:
            process, column = self.space["cat"], self.codec.tokens.index(name)
            x = {**self.space.prior(rng), "cat": cells.tokens}
            t = {m: torch.ones(len(cells.tokens), dtype=torch.float64, device=self.device) for m in self.space}
            out = self.space.evaluate(self.net_for(cells), x, t, ["cat"])["cat"][:, column, : process.states]
            closed = torch.nn.functional.pad(~pin.allowed, (0, process.states - len(pin.allowed)), value=True)
            scores = out.float().masked_fill(closed.to(self.device), -math.inf)[:, None]
            masked = torch.full((len(out), 1), process.mask_id, device=self.device)
            rate, keys = torch.ones(len(out), device=self.device), rng.keys(f"range {name}", Draw.STEP)
            drawn = kernels.tau_leap(scores, masked, rate, keys, process.states, "last")[:, 0]
            cells.tokens[:, column] = drawn
            regular = drawn == pin.codec.state(REGULAR)
        if pin.span is not None:
            column, (low, high) = self.codec.numbers.index(name), pin.span
            u = kernels.uniform(rng.keys(f"range {name}", Draw.PRIOR), 1)[:, 0].cpu().numpy()
            score = torch.from_numpy(pin.codec.quantiles.score(low + u * (high - low))).float().to(self.device)
            cells.scores[:, column] = torch.where(regular, score, cells.scores[:, column])
            cells.known[:, column] |= regular

    def _balance(self, cells: Cells, name: str) -> None:
        codec, n = self._column(name), len(cells.tokens)
        if not codec.states or codec.quantiles is not None:
            raise ValueError(f"column {name!r} is {codec.column.kind} with many values: it cannot be balanced")
        states = torch.tensor([i for i, state in enumerate(codec.states) if state != MISSING])
        cells.tokens[:, self.codec.tokens.index(name)] = states[torch.arange(n) % len(states)]

    def _column(self, name: str) -> ColumnCodec:
        codec = self.codec.columns.get(name)
        if codec is None:
            raise ValueError(f"unknown column {name!r}; the table has {', '.join(map(str, self.codec.columns))}")
        if not codec.states and codec.quantiles is None:
            raise ValueError(f"column {name!r} is {codec.column.kind} and is not modelled")
        return codec


def allowed_states(codec: ColumnCodec, condition: Condition) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Which of a column's states (bool, one per state) and which part of its quantile curve satisfy a condition.

    Raises:
        ValueError: nothing does.
    """
    name, states = codec.name, codec.states
    allowed = np.zeros(len(states), dtype=bool)
    ranged = isinstance(condition, tuple)
    if not ranged and pd.isna(condition):
        if codec.state(MISSING) < 0:
            raise ValueError(f"column {name!r} had no empty cells in training")
        allowed[codec.state(MISSING)] = True
        return allowed, None
    if not codec.numeric:
        if ranged:
            raise ValueError(f"column {name!r} is {codec.column.kind}: give a value, not a range")
        try:
            tokens, _ = codec.encode(pd.Series([condition], dtype=object), np.random.default_rng(0))
        except ValueError:
            tokens = _spelled(codec, condition)
        if states[int(tokens[0])] == RARE:
            raise ValueError(f"column {name!r}: {condition!r} is too rare, it is pooled with others (encoding.max_categories)")
        allowed[int(tokens[0])] = True
        return allowed, None
    low, high = (_number(codec, v) for v in (condition if ranged else (condition, condition)))
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    if low > high:
        raise ValueError(f"column {name!r}: the range {condition[0]}..{condition[1]} is empty")
    for i, state in enumerate(states):
        allowed[i] = state[0] == "v" and low <= state[1] <= high
    span = None
    single = low == high and allowed.any()
    if codec.quantiles is not None and not single and low <= codec.quantiles.high and high >= codec.quantiles.low:
        span = codec.quantiles.shares(low, high)
        if codec.state(REGULAR) >= 0:
            allowed[codec.state(REGULAR)] = True
    if span is None and not allowed.any():
        values = [state[1] for state in states if state[0] == "v"]
        values += [codec.quantiles.low, codec.quantiles.high] if codec.quantiles else []
        seen = codec.from_numbers(np.array([min(values), max(values)]))
        raise ValueError(
            f"column {name!r} has nothing in {condition if not ranged else f'{condition[0]}..{condition[1]}'}; "
            f"it runs from {seen.iloc[0]} to {seen.iloc[1]}"
        )
    return allowed, span


def _spelled(codec: ColumnCodec, condition) -> list[int]:
    """The state whose value is written like the condition, for values that came as text from a command line."""
    known = codec.decode(np.arange(len(codec.states)), None, len(codec.states), np.random.default_rng(0))
    texts = [str(v) for v in known]
    if str(condition) in texts:
        return [texts.index(str(condition))]
    shown = ", ".join(texts[:12]) + (", …" if len(texts) > 12 else "")
    raise ValueError(f"column {codec.name!r} never was {condition!r}; it has {shown}")


def _number(codec: ColumnCodec, value) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if codec.column.kind == "datetime" and codec.column.format is None:
        read = dates(pd.Series(pd.to_datetime([value], errors="coerce")), None)
        if read.isna().any():
            raise ValueError(f"column {codec.name!r}: {value!r} is not a date")
        return float(codec.to_numbers(read)[0])
    return float(codec.to_numbers(pd.Series([value]))[0])


def put(values: pd.Series, made: pd.Series) -> pd.Series:
    """A column with some cells replaced, in its own dtype where that holds the new cells."""
    out = values.copy() if values.notna().any() else values.astype(made.dtype)
    out.loc[made.index] = made.to_numpy(dtype=object) if out.dtype == object else made
    return out
