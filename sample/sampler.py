"""Any part from any other: joint, conditional and partly-noised sampling in one loop.

Algorithms 3 to 5 of Diffuse Everything (arXiv 2506.07903): what is given stays at its noise level, every other
modality walks its own grid of times from noise to data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..diffusion.guidance import Guidance
from ..diffusion.processes import Gaussian
from ..diffusion.space import Net, Space, expand_time, selects_rows
from ..kernels import Draw, LazyLogits, Places, Rng
from .cuda_graphs import graphed
from .plain import PlainRun
from .steppers import Sampler, Stepper


@dataclasses.dataclass(frozen=True)
class Given:
    """A modality that is known, clean or only up to a noise level.

    Args:
        x: (n, *shape) clean data; with `noised`, data already at `level`.
        level: noise level in [0, 1]; above 0 the engine noises x to it once and the network sees that.
        hold: True keeps the modality as a condition; False denoises it as well, from its level to 0.
    """

    x: Tensor
    level: float = 0.0
    hold: bool = True
    noised: bool = False

    @classmethod
    def of(cls, value: Tensor | tuple | Given) -> Given:
        if isinstance(value, Given):
            return value
        return cls(*value) if isinstance(value, tuple) else cls(value)


@torch.no_grad()
def sample(
    net: Net,
    space: Space,
    given: Mapping[str, Tensor | tuple[Tensor, float] | Given] | None = None,
    n: int | None = None,
    steps: int = 50,
    guidance: float | Guidance = 1.0,
    seed: int = 0,
    samplers: Mapping[str, Sampler] | None = None,
    first: int = 0,
    chunk: int | None = None,
    init: Mapping[str, Tensor] | None = None,
    trajectory: bool = False,
    progress: bool | Callable[[], None] = False,
    device: torch.device | str | None = None,
    engine: str = "fast",
    precision: str = "fp32",
) -> dict[str, Tensor] | tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Draw samples first, …, first + n − 1 of `seed`, every modality of the space.

    Sample i is a function of (seed, i): with the same chunk size it is the same bit for bit on the CPU whatever n,
    `first` or the split over processes; another chunk size draws the same random numbers and differs by rounding.

    Args:
        net: the network, `net(x, t, mask=…, outputs=…)`.
        given: {name: x}, {name: (x, level)} or {name: Given}; the rest is generated. See `Given`.
        n: number of samples; default the length of what is given, else 1.
        steps: updates of every generated modality.
        guidance: a scale or a `Guidance`. With something given, all generated modalities are guided by it; in
            joint sampling the Gaussian modalities are guided by the discrete ones.
        samplers: {name: Sampler}, default the process's own default on a linear grid.
        chunk: samples per batch; chunks start at multiples of it and are always computed whole. Default: n, at
            most 256, in one piece from `first`.
        init: {name: (n, *shape)}: starting states at time 1 instead of drawn noise.
        trajectory: also return the list of states before and after every update, on the CPU.
        progress: show a bar, or call this after each state: steps + 1 times a chunk.
        engine: fast, or plain: the straightforward way, for comparison (see `plain`).
        precision: fp32, or bf16: matrix products of the network in bfloat16 by autocast; states stay float32.

    Returns:
        {name: (n, *shape)}; given modalities as the network saw them. With trajectory, (samples, states).

    Raises:
        ValueError: unknown modality or sampler, data that does not fit its space, steps < 1, reversed intervals,
            guidance with nothing to guide by.
    """
    if engine not in RUNS:
        raise ValueError(f"engine must be one of {', '.join(RUNS)}, got {engine!r}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    given = {m: Given.of(value) for m, value in (given or {}).items()}
    init = _known(space, "init", init)
    n = _check(space, given, init, n, steps, first, chunk)
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(float(guidance))
    _known(space, "guidance", guidance.scale if isinstance(guidance.scale, dict) else None)
    samplers = _known(space, "samplers", samplers)
    device = torch.device(device) if device is not None else _device(net)
    results, states = [], []
    ranges = list(_chunks(first, n, chunk))
    asked = graphed(net) if engine == "fast" and device.type == "cuda" else net
    bf16 = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with bf16, _evaluating(net), _bar(progress, "sampling", len(ranges) * (steps + 1)) as advance:
        for start, size, low, high in ranges:

            def rows(x: Tensor, start=start, size=size) -> Tensor:
                """The chunk's rows of a tensor over the n samples; rows nobody asked for repeat its ends."""
                index = torch.arange(start - first, start - first + size).clamp(0, n - 1)
                x = x.to(device)[index.to(device)]
                return x.float() if x.is_floating_point() else x

            run = RUNS[engine](
                asked,
                space,
                {m: dataclasses.replace(g, x=rows(g.x)) for m, g in given.items()},
                {m: rows(x) for m, x in init.items()},
                steps,
                guidance,
                samplers,
                Rng(seed, torch.arange(start, start + size, device=device)),
            )
            chunk_states = []
            for x in run:
                if trajectory:
                    chunk_states.append({m: value[low:high].cpu() for m, value in x.items()})
                advance()
            results.append({m: value[low:high] for m, value in run.x.items()})
            states.append(chunk_states)
    samples = {m: torch.cat([part[m] for part in results]) for m in space}
    if not trajectory:
        return samples
    return samples, [{m: torch.cat([part[m] for part in parts]) for m in space} for parts in zip(*states, strict=True)]


class _Run:
    """One chunk on its way from noise to data; iterating yields the state before the first and after every update."""

    def __init__(self, net, space: Space, given, init, steps: int, guidance: Guidance, samplers, rng: Rng):
        self.net, self.space, self.steps, self.rng = net, space, steps, rng
        n, device = len(rng.samples), rng.samples.device
        self.held = [m for m, g in given.items() if g.hold]
        free = [m for m in space if m not in self.held]
        fresh = [m for m in free if m not in given and m not in init]
        self.x = {**space.prior(rng, fresh), **init}
        self.levels = {}
        for m, g in given.items():
            level = expand_time(g.level, n, device)
            keys = rng.keys(m, Draw.CONDITION)
            self.x[m] = g.x if g.noised or g.level == 0.0 else space[m].perturb(g.x, level, keys)
            self.levels[m] = level
        self.x = {m: self.x[m] for m in space}
        starts = {m: given[m].level if m in given else 1.0 for m in free}
        self.steppers: dict[str, Stepper] = {
            m: samplers.get(m, Sampler()).stepper(m, space[m], self.x[m], steps, starts[m], rng) for m in free
        }
        self.guidance = guidance
        self.guided, self.condition = _guided(space, guidance, free, self.held)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self.x
        for k in range(self.steps):
            self.x = self.update(k)
            yield self.x

    def update(self, k: int) -> dict[str, Tensor]:
        """Algorithm 5: one evaluation moves every modality, a second one corrects those that use Heun's rule."""
        moving = [m for m, s in self.steppers.items() if s.moves(k)]
        if not moving:
            return self.x
        t = {**self.levels, **{m: s.time(k) for m, s in self.steppers.items()}}  # a free modality's own clock rules
        out, uncond = self.answers(k, t, moving)
        x = dict(self.x)
        for m in moving:
            x[m] = self.steppers[m].step(k, self.x[m], out[m], uncond.get(m), self.guidance.scale_of(m))
        again = [m for m in moving if self.steppers[m].second and not self.steppers[m].is_last(k)]
        if again:
            there = {**self.x, **{m: x[m] for m in again}}
            t_there = {**t, **{m: self.steppers[m].time(k + 1) for m in again}}
            out, uncond = self.evaluate(k, there, t_there, again, self.rng.at(2 * k + 1))
            for m in again:
                x[m] = self.steppers[m].correct(k, self.x[m], x[m], out[m], uncond.get(m), self.guidance.scale_of(m))
        return x

    def answers(self, k: int, t: dict[str, Tensor], moving: list[str]) -> tuple[dict, dict]:
        """`evaluate` at the state, without the samples and positions that no moving modality changes in update k."""
        n, rng, places = len(self.rng.samples), self.rng.at(2 * k), self.changing(k, moving)
        rows = torch.arange(n)
        if len(places) == len(moving):
            busy = torch.stack([p.any(1) for p in places.values()]).any(0)
            rows = busy.nonzero()[:, 0] if busy.sum() < 0.9 * n else rows
        x = self.x
        if len(rows) < n:
            x, t, places = ({m: value[rows] for m, value in values.items()} for values in (x, t, places))
            rng = dataclasses.replace(rng, samples=rng.samples[rows])
        asked = {m: Places.where(p) for m, p in places.items()} if selects_rows(self.net) else {}
        outputs = {m: asked.get(m) for m in moving} if asked else moving
        return tuple(
            {m: self.whole(m, out, asked.get(m), rows) for m, out in branch.items()}
            for branch in self.evaluate(k, x, t, outputs, rng)
        )

    def changing(self, k: int, moving: list[str]) -> dict[str, Tensor]:
        """{name: (B, L) bool}: for the modalities that change in single places, where; only the CPU, which never waits
        to know, leaves any out."""
        places = {m: self.steppers[m].places(k) for m in moving if self.rng.samples.device.type == "cpu"}
        return {m: p for m, p in places.items() if p is not None}

    def whole(self, name: str, out: Tensor | LazyLogits, places: Places | None, rows: Tensor) -> Tensor | LazyLogits:
        """A network's answer about some of the chunk's rows, or places of them, as one about the whole chunk."""
        n = len(self.rng.samples)
        if places is not None:
            places = places._replace(rows=rows[places.rows])
            return LazyLogits.wrap(out).placed(places, n, self.x[name].shape[1])
        return out if len(rows) == n else LazyLogits.wrap(out).spread(rows, n)

    def evaluate(self, k: int, x, t, outputs: list[str] | dict[str, Places | None], rng: Rng) -> tuple[dict, dict]:
        """The network's answers, and those of the second branch for the modalities that are guided at update k."""
        guided = self.guided_at(k, outputs)
        if not guided:
            return self.space.evaluate(self.net, x, t, outputs), {}
        return self.guidance.evaluate(self.space, self.net, x, t, outputs, self.condition, rng, guided)

    def guided_at(self, k: int, outputs: Iterable[str]) -> list[str]:
        """Those of `outputs` that guidance acts on at update k."""
        return [m for m in self.guided if m in outputs and self.guidance.active(m, self.steppers[m].nominal[k])]


class _PlainRun(PlainRun, _Run):
    """The same on the plain engine."""


RUNS = {"fast": _Run, "plain": _PlainRun}


def _guided(space: Space, guidance: Guidance, free: list[str], held: list[str]) -> tuple[list[str], list[str]]:
    """Which modalities are guided, and by which: what is given guides the rest, else discrete ones Gaussian ones."""
    guided = [m for m in free if guidance.scale_of(m) != 1.0 and (held or isinstance(space[m], Gaussian))]
    condition = held or [m for m in free if not isinstance(space[m], Gaussian)]
    scales = [guidance.scale_of(m) for m in free] if isinstance(guidance.scale, dict) else [guidance.scale]
    if any(scale != 1.0 for scale in scales) and not (guided and condition):
        raise ValueError(
            "guidance needs a condition: give a modality, or guide a Gaussian one that is sampled with a discrete one"
        )
    return guided if condition else [], condition


def _check(space: Space, given: dict[str, Given], init, n: int | None, steps: int, first: int, chunk) -> int:
    """The number of samples; ValueError for arguments that do not fit the space or each other."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    for m, g in given.items():
        if not 0.0 <= g.level <= 1.0:
            raise ValueError(f"{m}: noise level must lie in [0, 1], got {g.level}")
        if not g.noised:
            space.check({m: g.x})
        elif m not in space:
            raise ValueError(f"unknown modality {m!r}; this space has {', '.join(space)}")
        else:
            space[m].check_shape(m, g.x)
        n = len(g.x) if n is None else n
        if len(g.x) != n:
            raise ValueError(f"{m}: {len(g.x)} given for n = {n} samples")
    if given and all(g.hold for g in given.values()) and len(given) == len(space):
        raise ValueError("every modality is given: there is nothing to generate")
    n = 1 if n is None else n
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for m, x in init.items():
        space[m].check_shape(m, x)
        if m in given:
            raise ValueError(f"{m}: give data or a starting state, not both")
        if len(x) != n:
            raise ValueError(f"{m}: {len(x)} starting states for n = {n} samples")
    return n


def _known(space: Space, what: str, values: Mapping | None) -> dict:
    if unknown := set(values or {}) - set(space):
        raise ValueError(f"{what}: unknown modality {sorted(unknown)[0]!r}; this space has {', '.join(space)}")
    return dict(values or {})


def _chunks(first: int, n: int, chunk: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(start, size, low, high): batch samples start … start + size − 1 and keep rows low to high of it."""
    if chunk is None:
        for start in range(first, first + n, 256):
            size = min(256, first + n - start)
            yield start, size, 0, size
        return
    for start in range(first // chunk * chunk, first + n, chunk):
        yield start, chunk, max(first - start, 0), min(first + n - start, chunk)


def _device(net) -> torch.device:
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextlib.contextmanager
def _evaluating(net):
    training = [m for m in net.modules() if m.training] if isinstance(net, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _bar(show: bool | Callable[[], None], label: str, total: int):
    """A function to call after each state."""
    if callable(show) or not show:
        yield show or (lambda: None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
