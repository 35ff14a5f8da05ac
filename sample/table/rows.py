"""Rows from a table model: unconditional, given values or ranges of columns, balanced, or with missing cells filled.

No row is rejected. A given value is an observed cell. A range on a column with tokens is sampled first, by one
evaluation of the network with the logits outside the range at −∞, so that it follows the model's distribution under the
other conditions. Where the range leaves part of a continuous column, the value is drawn from the training quantiles
within it. The rest of the row is then sampled as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import kernels
from ...configs.runs import CheckpointError
from ...kernels import Draw, LazyLogits, Rng
from ...model.codecs.table.codec import TableCodec
from ...model.codecs.table.column import MISSING, REGULAR, ColumnCodec
from ...model.codecs.table.rows import RowCodec
from ..condition import Condition
from ..pipeline import Pipeline
from ..sampler import sample
from .constraints import ColumnCondition, RangeConstraint, allowed_states, is_single_number
from .incomplete import Incomplete

BATCH_ROWS = 4096  # default batch size
CPU_LOGITS = 2**28  # logits in a batch on a CPU, at most: 1 GiB where all are in memory at once
GPU_BATCH_ROWS = 65536  # on a GPU, where so small a network is limited by launches rather than by rows
GPU_LOGITS = 2**29  # logits in a batch on a GPU, at most: 2 GiB
DRAW_SEED = 1_000_003  # draw d of an imputation has the seed `seed + DRAW_SEED * d`


@dataclasses.dataclass
class ObservedCells:
    """The observed cells of n rows.

    Args:
        tokens: (n, C) int64, the mask where a cell is not observed.
        z: (n, C) float32.
        observed: (n, C) bool, the cells of z that are observed.
    """

    tokens: Tensor
    z: Tensor
    observed: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> ObservedCells:
        return ObservedCells(self.tokens[index], self.z[index], self.observed[index])

    def to(self, device: torch.device) -> ObservedCells:
        return ObservedCells(self.tokens.to(device), self.z.to(device), self.observed.to(device))


@dataclasses.dataclass
class TableSampler:
    """Samples rows of a table model in batches of constant size.

    Args:
        steps: sampling steps; default the config's.
        seed: row i is a function of (seed, i), whatever n.
        progress: show a bar.
    """

    pipeline: Pipeline
    steps: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self):
        self.codec, self.space = columns_of(self.pipeline), self.pipeline.space
        self.device = next(self.pipeline.net.parameters()).device

    def sample(
        self, n: int, where: Mapping[str, ColumnCondition] | None = None, balance: str | None = None
    ) -> pd.DataFrame:
        """n new rows.

        Args:
            where: {column: condition}, see `ColumnCondition`.
            balance: a categorical column whose values are equally frequent.

        Raises:
            ValueError: an unknown column, a value that the column does not have, an empty range, or a column to
                balance that is not categorical.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        cells, where = self.no_cells(n), dict(where or {})
        if balance is not None:
            if balance in where:
                raise ValueError(f"column {balance!r} cannot be balanced and given at once")
            self._balance(cells, balance)
        constraints = [self._constrain(cells, name, condition) for name, condition in where.items()]
        table = self.codec.decode(*self.sample_cells(cells, constraints), self.seed)
        for name, condition in where.items():
            column = self.codec.columns[name]
            if is_single_number(column, condition):  # as it was given, not rounded by the codec
                table[name] = column.from_numbers(np.repeat(column.to_numbers(pd.Series([condition])), n))
        return table

    def impute(
        self, table: pd.DataFrame | Incomplete, draw: int = 0, cells: ObservedCells | None = None
    ) -> pd.DataFrame:
        """The table with its missing cells sampled given the others, which stay as they are.

        Args:
            draw: number of the draw; each has its own random numbers.
            cells: the observed cells of the table, to compute them only once for several draws.
        """
        given = table if isinstance(table, Incomplete) else Incomplete.of(self.codec, table)
        if not len(given.rows):
            return given.filled({})
        cells = self.observed_cells(given.known) if cells is None else cells
        sampler = dataclasses.replace(self, seed=self.seed + DRAW_SEED * draw)
        tokens, z = sampler.sample_cells(cells.rows(torch.from_numpy(given.rows)), [], self.present_states())
        return given.filled(self.codec.decode(tokens, z, sampler.seed).set_axis(given.rows))

    def no_cells(self, n: int) -> ObservedCells:
        """n rows without observed cells."""
        mask_id = self.space["cat"].mask_id if "cat" in self.space else 0
        numerical = len(self.codec.numerical)
        return ObservedCells(
            torch.full((n, len(self.codec.categorical)), mask_id),
            torch.zeros(n, numerical),
            torch.zeros(n, numerical, dtype=torch.bool),
        )

    def observed_cells(self, table: pd.DataFrame) -> ObservedCells:
        """The cells of a table that are not missing."""
        tokens, z = self.codec.encode(table)
        cells = self.no_cells(len(table))
        for c, name in enumerate(self.codec.categorical):
            present = torch.tensor(table[name].notna().to_numpy())
            cells.tokens[:, c] = torch.where(present, tokens[:, c], cells.tokens[:, c])
        for c, name in enumerate(self.codec.numerical):
            cells.observed[:, c] = torch.tensor(table[name].notna().to_numpy())
        # an observed cell that is not regular has a token but no z, and gets noise, as in training
        noise = kernels.normal(Rng.for_batch(self.seed, len(table)).keys("fill", Draw.DATA), max(z.shape[1], 1))
        cells.z = torch.where(z.isnan(), noise[:, : z.shape[1]], z)
        return cells

    def present_states(self) -> dict[str, Tensor]:
        """The states that imputed cells may take, {"cat": (C, K) bool}: all but those that mean a missing cell."""
        if "cat" not in self.space:
            return {}
        allowed = torch.ones(len(self.codec.categorical), self.space["cat"].states, dtype=torch.bool)
        for c, name in enumerate(self.codec.categorical):
            column = self.codec.columns[name]
            if column.state(MISSING) >= 0 and len(column.states) > 1:
                allowed[c, column.state(MISSING)] = False
        return {"cat": allowed}

    def sample_cells(
        self,
        cells: ObservedCells,
        constraints: list[RangeConstraint],
        allowed_states: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (n, C) and z (n, C) of rows, sampled where they are not observed, on the CPU.

        Args:
            constraints: columns to sample first, within their ranges.
            allowed_states: {"cat": (C, K) bool}, the states that cells may take.
        """
        n = len(cells)
        size, batches = self.batch_rows(n), []
        for start in range(0, n, size):
            index = torch.arange(start, start + size).clamp(max=n - 1)
            batch = cells.rows(index).to(self.device)
            for constraint in constraints:
                self._sample_in_range(batch, constraint, Rng.for_batch(self.seed, size, start, self.device))
            batches.append(self.sample_batch(batch, start, allowed_states))
        tokens, z = (torch.cat(parts)[:n].cpu() for parts in zip(*batches, strict=True))
        return tokens, z

    def batch_rows(self, n: int) -> int:
        """The batch size for n rows: the config's, else a function of the device type, the table and n alone, so that
        the same command gives the same rows."""
        if self.pipeline.config.sample.batch_size is not None:
            return min(self.pipeline.config.sample.batch_size, n)
        logits = max(len(self.codec.categorical) * max(self.codec.states, default=0), 1)
        if self.device.type == "cpu":
            return min(BATCH_ROWS, max(CPU_LOGITS // logits, 1), n)
        return min(GPU_BATCH_ROWS, max(GPU_LOGITS // logits, 1), n)

    def sample_batch(
        self,
        cells: ObservedCells,
        start: int,
        allowed_states: Mapping[str, Tensor] | None = None,
        z_uniforms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and z of one batch, rows start, … of a table.

        z_uniforms: (n, C) float64 in (0, 1), which become the initial noise of z; default `Pipeline.uniforms`.
        """
        uniforms = self.pipeline.uniforms(self.seed, start, len(cells))
        if z_uniforms is not None and "num" in self.space:
            uniforms["num"] = z_uniforms
        out = sample(
            self.pipeline.net,
            self.space,
            self.conditions(cells),
            n=len(cells),
            steps=self.steps or self.pipeline.config.sample.steps,
            seed=self.seed,
            samplers=self.pipeline.samplers,
            start_index=start,
            batch_size=len(cells),
            uniforms=uniforms,
            allowed_states=allowed_states,
            progress=self.progress,
            device=self.device,
        )
        if "num" not in out:
            return out["cat"], cells.z
        columns = zip(self.codec.numerical, out["num"].unbind(1), strict=True)
        generated = torch.stack([self.codec.columns[name].quantiles.clip_tails(z) for name, z in columns], 1)
        return out.get("cat", cells.tokens), torch.where(cells.observed, cells.z, generated)

    def conditions(self, cells: ObservedCells) -> dict[str, Condition]:
        """The observed cells as conditions."""
        conditions = {}
        if "cat" in self.space:
            observed = cells.tokens != self.space["cat"].mask_id
            if bool(observed.any()):
                conditions["cat"] = Condition(cells.tokens, mask=observed)
        if self.observed_z(cells):
            conditions["num"] = Condition(cells.z, mask=cells.observed)
        return conditions

    def observed_z(self, cells: ObservedCells) -> dict[str, Tensor]:
        """{"num": (n, C) bool}, the observed cells of z; empty if there are none.

        Raises:
            ValueError: there are, and the network was not trained with such.
        """
        if "num" not in self.space or not bool(cells.observed.any()):
            return {}
        if "num" not in self.pipeline.net.observes:
            raise ValueError(
                "conditions on numbers need a model trained with them: fit it with conditioning_prob=0.25 or so"
            )
        return {"num": cells.observed}

    def token_logits(self, cells: ObservedCells, noise: Tensor | None) -> Tensor:
        """(n, C, K or more) logits of the tokens given the observed cells, at time 1; noise: (n, C) of z, if any."""
        x = {"cat": cells.tokens}
        if noise is not None:
            x["num"] = torch.where(cells.observed, cells.z, noise)
        t = {m: torch.ones(len(cells), dtype=torch.float64, device=self.device) for m in self.space}
        out = self.space.evaluate(self.pipeline.net, x, t, ["cat"], self.observed_z(cells))["cat"]
        return LazyLogits.wrap(out).values()

    def _constrain(self, cells: ObservedCells, name: str, condition: ColumnCondition) -> RangeConstraint:
        """The constraint of a condition; a single state that it allows becomes an observed cell of all rows."""
        column = self._column(name)
        allowed, interval = allowed_states(column, condition)
        if allowed.sum() == 1:
            cells.tokens[:, self.codec.categorical.index(name)] = int(np.flatnonzero(allowed)[0])
        return RangeConstraint(column, torch.from_numpy(allowed) if allowed.sum() > 1 else None, interval)

    @torch.no_grad()
    def _sample_in_range(self, cells: ObservedCells, constraint: RangeConstraint, rng: Rng) -> None:
        """Sample one column within its range and make it observed; all cells not observed are pure noise."""
        regular = torch.ones(len(cells), dtype=torch.bool, device=self.device)
        if constraint.allowed is not None:
            tokens = self._sample_allowed(cells, constraint, rng)
            cells.tokens[:, self.codec.categorical.index(constraint.codec.name)] = tokens
            regular = tokens == constraint.codec.state(REGULAR)
        if constraint.interval is not None:
            column, (low, high) = self.codec.numerical.index(constraint.codec.name), constraint.interval
            u = kernels.uniform(rng.keys(f"range {constraint.codec.name}", Draw.PRIOR), 1)[:, 0].cpu().numpy()
            z = torch.from_numpy(constraint.codec.quantiles.to_z(low + u * (high - low))).float().to(self.device)
            cells.z[:, column] = torch.where(regular, z, cells.z[:, column])
            cells.observed[:, column] |= regular

    def _sample_allowed(self, cells: ObservedCells, constraint: RangeConstraint, rng: Rng) -> Tensor:
        """(n,) tokens of one column among its allowed states, from the prediction at time 1."""
        process, name, n = self.space["cat"], constraint.codec.name, len(cells)
        logits = self.token_logits(cells, self.space.prior(rng).get("num"))
        logits = logits[:, self.codec.categorical.index(name), None, : process.states].float()
        allowed = torch.nn.functional.pad(constraint.allowed, (0, process.states - len(constraint.allowed)))
        logits = LazyLogits(logits).restrict(allowed[None].to(self.device)).values()
        masked = torch.full((n, 1), process.mask_id, device=self.device)
        rate, keys = torch.ones(n, device=self.device), rng.keys(f"range {name}", Draw.STEP)
        return kernels.tau_leap(logits, masked, rate, keys, process.states, "last")[:, 0]

    def _balance(self, cells: ObservedCells, name: str) -> None:
        """Observe the values of a categorical column in turn."""
        column = self._column(name)
        if not column.states or column.quantiles is not None:
            raise ValueError(f"column {name!r} is {column.column.kind} with many values: it cannot be balanced")
        states = torch.tensor([token for token, state in enumerate(column.states) if state != MISSING])
        cells.tokens[:, self.codec.categorical.index(name)] = states[torch.arange(len(cells)) % len(states)]

    def _column(self, name: str) -> ColumnCodec:
        column = self.codec.columns.get(name)
        if column is None:
            raise ValueError(f"unknown column {name!r}; the table has {', '.join(map(str, self.codec.columns))}")
        if not column.states and column.quantiles is None:
            raise ValueError(f"column {name!r} is {column.column.kind} and is not modelled")
        return column


def columns_of(pipeline: Pipeline) -> TableCodec:
    """The codec of the columns of a model of a table and nothing else.

    Raises:
        CheckpointError: it is another model.
    """
    codec = next(iter(pipeline.codecs.values()))
    if len(pipeline.codecs) > 1 or not isinstance(codec, RowCodec):
        raise CheckpointError(
            f"this model is not one of a table alone, it has {', '.join(pipeline.codecs)}: "
            "use anystate sample or Pipeline"
        )
    return codec.table
