"""Cells of table rows as tokens and z: those that are observed, and the sampling of all others in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ...configs.runs import CheckpointError
from ...kernels import LazyLogits
from ...model.codecs.table.codec import TableCodec
from ...model.codecs.table.column import MISSING
from ...model.codecs.table.rows import RowCodec
from ..condition import Condition
from ..pipeline import Pipeline
from ..sampler import sample

BATCH_ROWS = 4096  # default batch size
CPU_LOGITS = 2**28  # logits in a batch on a CPU, at most: 1 GiB where all are in memory at once
GPU_BATCH_ROWS = 65536  # on a GPU, where so small a network is limited by launches rather than by rows
GPU_LOGITS = 2**29  # logits in a batch on a GPU, at most: 2 GiB


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
class CellSampler:
    """Samples cells of a table model in batches of constant size.

    Args:
        steps: sampling steps; default the config's.
        seed: row i is a function of (seed, i), whatever n, except for rows of rare regions (see `splitting`).
        progress: show a bar.
    """

    pipeline: Pipeline
    steps: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self):
        self.codec, self.space = columns_of(self.pipeline), self.pipeline.space
        self.device = next(self.pipeline.net.parameters()).device

    @property
    def observes(self) -> bool:
        """Whether numbers can be given to the network as observed."""
        return "num" in self.space and "num" in self.pipeline.net.observes

    def no_cells(self, n: int) -> ObservedCells:
        """n rows without observed cells."""
        mask_id = self.space["cat"].mask_id if "cat" in self.space else 0
        numerical = len(self.codec.numerical)
        return ObservedCells(
            torch.full((n, len(self.codec.categorical)), mask_id),
            torch.zeros(n, numerical),
            torch.zeros(n, numerical, dtype=torch.bool),
        )

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
        allowed_states: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (n, C) and z (n, C) of rows, sampled where they are not observed, on the CPU.

        Args:
            allowed_states: {"cat": (C, K) bool}, the states that cells may take.
        """
        n = len(cells)
        size, batches = self.batch_rows(n), []
        for start in range(0, n, size):
            index = torch.arange(start, start + size).clamp(max=n - 1)
            batch = cells.rows(index).to(self.device)
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
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and z of one batch, rows start, … of a table.

        Args:
            z_uniforms: (n, C) float64 in (0, 1), which become the initial noise of z; default `Pipeline.uniforms`.
            indices: (n,) int64, numbers of the rows in the place of start, …; their noise is independent.
        """
        uniforms = self.pipeline.uniforms(self.seed, start, len(cells)) if indices is None else {}
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
            indices=indices,
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
