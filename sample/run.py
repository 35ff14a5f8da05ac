"""Algorithm 5 of Diffuse Everything (arXiv 2506.07903) for one batch: every modality moves along its own time grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.guidance import Guidance, partial_outputs
from ..diffusion.processes import Gaussian
from ..diffusion.space import Net, Space, expand_time
from ..kernels import LazyLogits, Rng
from ..kernels.backend import default_backend
from .condition import Condition, initial_state, is_exact
from .steppers import Sampler, Stage, Stepper, Update

Observed = tuple[tuple[str, str], ...]  # (modality, "clean" or "noised"): how its observed elements are set


class Kind(NamedTuple):
    """What the host decides about an update; updates of one kind launch the same kernels.

    Args:
        stages: (modality, stage) of those that move.
        guided: the modalities that are guided.
        observed: how observed elements are set after the update.
    """

    stages: tuple[tuple[str, Stage], ...]
    guided: tuple[str, ...]
    observed: Observed


class Run:
    """Algorithm 5 for one batch.

    `update` is a function of the kind of an update and of tensors, which it changes in place. A CUDA graph of it can
    therefore be replayed for all updates of its kind, in this batch and in others of the same `signature`.
    """

    def __init__(
        self,
        net: Net,
        space: Space,
        conditions: Mapping[str, Condition],
        steps: int,
        guidance: Guidance,
        samplers: Mapping[str, Sampler],
        rng: Rng,
        allowed_states: Mapping[str, Tensor],
    ):
        self.net, self.space, self.guidance, self.rng = net, space, guidance, rng.at(0).with_words()
        self.conditions, self.allowed_states = conditions, allowed_states
        self.partial = {m: c for m, c in conditions.items() if c.mask is not None}
        conditioned = [m for m in conditions if m not in self.partial]
        generated = [m for m in space if m not in conditioned]
        x = initial_state(space, conditions, generated, rng)
        self.t = {m: expand_time(conditions[m].t, len(rng.samples), rng.samples.device) for m in conditioned}
        self.steppers: dict[str, Stepper] = {
            m: samplers.get(m, Sampler()).stepper(m, space[m], x[m], steps, rng) for m in generated
        }
        self.observed = {m: c.mask for m, c in self.partial.items() if c.t == 0 and m in getattr(net, "observes", ())}
        self.guided, self.guiding = guidance_between(space, guidance, generated, conditioned)
        start = {m: self.steppers[m].at(rng.samples.new_zeros(()))[0] for m in self.partial}
        self.x = self.with_observed(x, self.observed_at(0), start)
        self.kinds = [self.kind(k) for k in range(steps)]
        self.after = torch.tensor(clock_after(self.kinds), device=rng.samples.device)
        self.clock = self.after[-1].clone()

    def states(self, update: Callable[[Kind], None]) -> Iterator[dict[str, Tensor]]:
        """The state before the first update and after each one, in the same tensors; update: `Run.update`, or a
        function that replays it."""
        yield self.x
        for kind in self.kinds:
            if kind is not None:
                update(kind)
            yield self.x

    def update(self, kind: Kind) -> None:
        """One evaluation for the step of every modality, a second one for samplers with a corrector."""
        (k, first, second), rng = self.clock.unbind(), self.rng.at(self.clock[0])
        rows = {m: stepper.at(k) for m, stepper in self.steppers.items()}
        t, later = ({m: row[i] for m, row in rows.items()} for i in range(2))
        updates = {m: Update(k, t[m], tuple(rows[m][2:]), rng, stage) for m, stage in kind.stages}
        out, uncond = self.evaluate(kind, self.x, {**self.t, **t}, list(updates), self.rng.at(first))
        x = dict(self.x)
        for m, update in updates.items():
            x[m] = self.steppers[m].step(update, self.x[m], out[m], uncond.get(m), self.guidance.scale_of(m))
        x = self.with_observed(x, kind.observed, later)
        corrected = [m for m, u in updates.items() if self.steppers[m].has_corrector and not u.stage.last]
        if corrected:
            x_hat = {m: x[m] if m in corrected else self.x[m] for m in x}
            t_hat = {**self.t, **t, **{m: later[m] for m in corrected}}
            out, uncond = self.evaluate(kind, x_hat, t_hat, corrected, self.rng.at(second))
            for m in corrected:
                scale = self.guidance.scale_of(m)
                x[m] = self.steppers[m].correct(updates[m], self.x[m], x[m], out[m], uncond.get(m), scale)
            x = self.with_observed(x, kind.observed, later)
        for m in x:
            if x[m] is not self.x[m]:
                self.x[m].copy_(x[m])
        self.clock.copy_(self.after.index_select(0, k.view(1))[0])

    def kind(self, k: int) -> Kind | None:
        """The kind of update k; None where no modality moves."""
        stages = {m: stage for m, s in self.steppers.items() if (stage := s.stage(k)) is not None}
        guided = [m for m in self.guided if m in stages and self.guidance.is_active(m, self.steppers[m].times[k])]
        return Kind(tuple(stages.items()), tuple(guided), self.observed_at(k + 1)) if stages else None

    def observed_at(self, k: int) -> Observed:
        """How the observed elements of conditions with a mask are set at time step k of the grids."""
        found = {}
        for m, c in self.partial.items():
            time = self.steppers[m].times[k]
            if m in self.observed or (time == 0.0 and c.t == 0.0):
                found[m] = "clean"
            elif time >= c.t and not is_exact(self.space[m]):
                found[m] = "noised"
        return tuple(found.items())

    def evaluate(
        self, kind: Kind, x: dict[str, Tensor], t: dict[str, Tensor], outputs: list[str], rng: Rng
    ) -> tuple[dict, dict]:
        """The predictions for `outputs` and, for those that are guided, the ones under the noisier condition."""
        guided = [m for m in kind.guided if m in outputs]
        options = {"observed": self.observed, "positions": self.positions(outputs)}
        if guided:
            conditions = self.guiding
            both = self.guidance.evaluate(self.space, self.net, x, t, outputs, conditions, rng, guided, **options)
        else:
            both = self.space.evaluate(self.net, x, t, outputs, **options), {}
        for m, allowed in self.allowed_states.items():
            for out in both:
                if m in out:
                    out[m] = LazyLogits.wrap(out[m]).restrict(allowed)
        return both

    def positions(self, outputs: list[str]) -> dict[str, Tensor]:
        """{modality: flat indices of the positions that this update can change}, so that the network can skip others.

        On the CPU only: on a GPU, finding them would force a synchronization.
        """
        if self.rng.samples.device.type != "cpu" or not partial_outputs(self.net):
            return {}
        changed = {m: self.steppers[m].changed_positions(self.clock[0]) for m in outputs}
        return {m: mask.flatten().nonzero()[:, 0] for m, mask in changed.items() if mask is not None}

    def with_observed(self, x: dict[str, Tensor], observed: Observed, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state at times t with the observed elements of conditions with a mask set."""
        x = dict(x)
        for m, how in observed:
            c = self.partial[m]
            x[m] = torch.where(c.mask, c.x if how == "clean" else c.at(m, self.space[m], self.rng, t[m]), x[m])
        return x

    def tensors(self) -> list[Tensor]:
        """All that differs between batches of one signature, the state included."""
        partial = [part for c in self.partial.values() for part in (c.x, c.mask)]
        steppers = [part for s in self.steppers.values() for part in s.tensors()]
        return [
            *self.x.values(),
            self.clock,
            self.after,
            self.rng.words,
            *self.allowed_states.values(),
            *partial,
            *steppers,
        ]

    def signature(self) -> tuple:
        """Equal for runs whose updates of a kind launch the same kernels on memory of the same shapes."""
        device = self.rng.samples.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple((tuple(x.shape), x.dtype) for x in self.tensors())
        methods = tuple((m, s.method) for m, s in self.steppers.items())
        conditions = tuple((m, float(c.t), m in self.observed) for m, c in self.conditions.items())
        settings = id(self.space), self.guidance.model_dump_json(), tuple(self.allowed_states)
        return settings, methods, conditions, shapes, precision, default_backend()

    def load(self, other: Run) -> None:
        """Take over the batch of another run of the same signature."""
        self.kinds = other.kinds
        for mine, value in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(value)


def clock_after(kinds: Sequence[Kind | None]) -> list[list[int]]:
    """What the clock shows after update k, [k′, 2k′, 2k′ + 1] of the next update k′ that changes anything; in the last
    row, at the start. The last two numbers are the steps of the random numbers of its evaluations."""
    moving = [k for k, kind in enumerate(kinds) if kind is not None]
    following = dict(zip([-1, *moving], [*moving, len(kinds)], strict=True))
    rows = [following.get(k, len(kinds)) for k in [*range(len(kinds)), -1]]
    return [[k, 2 * k, 2 * k + 1] for k in rows]


def guidance_between(
    space: Space, guidance: Guidance, generated: list[str], conditioned: list[str]
) -> tuple[list[str], list[str]]:
    """(the guided modalities, those that guide): conditions guide the rest, else discrete ones guide Gaussian ones."""
    guided = [m for m in generated if guidance.scale_of(m) != 1.0 and (conditioned or isinstance(space[m], Gaussian))]
    guiding = conditioned or [m for m in generated if not isinstance(space[m], Gaussian)]
    scales = [guidance.scale_of(m) for m in generated] if isinstance(guidance.scale, dict) else [guidance.scale]
    if any(scale != 1.0 for scale in scales) and not (guided and guiding):
        raise ValueError(
            "guidance needs a condition: give a modality, or guide a Gaussian one that is sampled with a discrete one"
        )
    return guided if guiding else [], guiding
