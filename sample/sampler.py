"""Any part from any other: joint, conditional and partly-noised sampling.

Algorithms 3 to 5 of Diffuse Everything (arXiv 2506.07903): a condition stays at its noise time, every other modality
follows its own time grid from noise to data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..diffusion.guidance import Guidance, partial_outputs
from ..diffusion.processes import Discrete, Gaussian
from ..diffusion.space import Net, Space, expand_time
from ..kernels import LazyLogits, Rng
from .condition import Condition, initial_state, is_exact
from .cuda_graphs import with_cuda_graphs
from .progress import progress_bar
from .steppers import Sampler, Stepper

LARGEST_BATCH = 256  # samples at a time by default


class Run:
    """Algorithm 5 for one batch; iterating yields the state before the first update and after every one."""

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
        self.net, self.space, self.steps, self.guidance, self.rng = net, space, steps, guidance, rng
        self.allowed_states, n, device = allowed_states, len(rng.samples), rng.samples.device
        self.conditioned = [m for m, c in conditions.items() if c.mask is None]
        self.partial = {m: c for m, c in conditions.items() if c.mask is not None}
        generated = [m for m in space if m not in self.conditioned]
        x = initial_state(space, conditions, generated, rng)
        self.t = {m: expand_time(conditions[m].t, n, device) for m in self.conditioned}
        self.steppers: dict[str, Stepper] = {
            m: samplers.get(m, Sampler()).stepper(m, space[m], x[m], steps, rng) for m in generated
        }
        self.observed = {m: c.mask for m, c in self.partial.items() if c.t == 0 and m in getattr(net, "observes", ())}
        self.x = self.with_observed(x, 0)
        self.guided, self.guiding = guidance_between(space, guidance, generated, self.conditioned)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self.x
        for k in range(self.steps):
            self.x = self.update(k)
            yield self.x

    def update(self, k: int) -> dict[str, Tensor]:
        """One evaluation for the step of every modality, a second one for samplers with a corrector."""
        active = [m for m, s in self.steppers.items() if s.is_active(k)]
        if not active:
            return self.x
        t = {**self.t, **{m: s.time(k) for m, s in self.steppers.items()}}
        out, uncond = self.evaluate(k, self.x, t, active, self.rng.at(2 * k))
        x = dict(self.x)
        for m in active:
            x[m] = self.steppers[m].step(k, self.x[m], out[m], uncond.get(m), self.guidance.scale_of(m))
        x = self.with_observed(x, k + 1)
        corrected = [m for m in active if self.steppers[m].has_corrector and not self.steppers[m].is_last(k)]
        if corrected:
            x_hat = {**self.x, **{m: x[m] for m in corrected}}
            t_hat = {**t, **{m: self.steppers[m].time(k + 1) for m in corrected}}
            out, uncond = self.evaluate(k, x_hat, t_hat, corrected, self.rng.at(2 * k + 1))
            for m in corrected:
                scale = self.guidance.scale_of(m)
                x[m] = self.steppers[m].correct(k, self.x[m], x[m], out[m], uncond.get(m), scale)
            x = self.with_observed(x, k + 1)
        return x

    def evaluate(
        self, k: int, x: dict[str, Tensor], t: dict[str, Tensor], outputs: list[str], rng: Rng
    ) -> tuple[dict, dict]:
        """The predictions for `outputs` and, for those guided in update k, the ones under the noisier condition."""
        guided = [m for m in self.guided if m in outputs and self.guidance.is_active(m, self.steppers[m].times[k])]
        options = {"observed": self.observed, "positions": self.positions(k, outputs)}
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

    def positions(self, k: int, outputs: list[str]) -> dict[str, Tensor]:
        """{modality: flat indices of the positions that update k can change}, so that the network can skip the others.

        On the CPU only: on a GPU, finding them would force a synchronization.
        """
        if self.rng.samples.device.type != "cpu" or not partial_outputs(self.net):
            return {}
        changed = {m: self.steppers[m].changed_positions(k) for m in outputs}
        return {m: mask.flatten().nonzero()[:, 0] for m, mask in changed.items() if mask is not None}

    def with_observed(self, x: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        """The state with the observed elements of conditions with a mask set, for time step k of the grids."""
        x = dict(x)
        for m, c in self.partial.items():
            time = self.steppers[m].times[k]
            if m in self.observed or (time == 0.0 and c.t == 0.0):
                x[m] = torch.where(c.mask, c.x, x[m])
            elif time >= c.t and not is_exact(self.space[m]):
                x[m] = torch.where(c.mask, c.at(m, self.space[m], self.rng, self.steppers[m].time(k)), x[m])
        return x


@torch.no_grad()
def sample(
    net: Net,
    space: Space,
    conditions: Mapping[str, Tensor | tuple[Tensor, float] | Condition] | None = None,
    n: int | None = None,
    steps: int = 50,
    guidance: float | Guidance = 1.0,
    seed: int = 0,
    samplers: Mapping[str, Sampler] | None = None,
    start_index: int = 0,
    batch_size: int | None = None,
    uniforms: Mapping[str, Tensor] | None = None,
    allowed_states: Mapping[str, Tensor] | None = None,
    trajectory: bool = False,
    progress: bool | Callable[[], None] = False,
    device: torch.device | str | None = None,
    precision: str = "fp32",
) -> dict[str, Tensor] | tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Draw samples start_index, …, start_index + n − 1 of `seed`, every modality of the space.

    Sample i is a function of (seed, i): with the same batch size it is the same bit for bit on the CPU whatever n,
    `start_index` or the split over processes; another batch size draws the same random numbers and differs by rounding.

    Args:
        net: the network, `net(x, t, mask=…, outputs=…)`, see `Space.evaluate`.
        conditions: {modality: x}, {modality: (x, t)} or {modality: Condition}; the rest is generated.
        n: number of samples; default the length of the conditions, else 1.
        steps: updates of every generated modality.
        guidance: a scale or a `Guidance`. With conditions, all generated modalities are guided by them; in joint
            sampling the Gaussian modalities are guided by the discrete ones.
        samplers: {modality: Sampler}; default the process's own default on a linear grid.
        batch_size: samples per batch; batches start at multiples of it and are always computed whole. Default: n, at
            most 256, from `start_index`.
        uniforms: {modality: (n, *shape) float64 in (0, 1)}, in place of independent random numbers (see `Rng`).
        allowed_states: {discrete modality: (L, K) bool}, the states that positions may take.
        trajectory: also return the list of states before and after every update, on the CPU.
        progress: show a bar, or a function to call after each state, steps + 1 times a batch.
        precision: fp32, or bf16: matrix products of the network in bfloat16 by autocast; states stay float32.

    Returns:
        {modality: (n, *shape)}; conditions as the network saw them. With trajectory, (samples, states).

    Raises:
        ValueError: unknown modality or sampler, data that does not fit its space, steps < 1, reversed intervals,
            guidance without a condition.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    conditions = {m: Condition.wrap(value) for m, value in (conditions or {}).items()}
    n = check_arguments(space, conditions, n, steps, start_index, batch_size)
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(float(guidance))
    check_names(space, "guidance", guidance.scale if isinstance(guidance.scale, dict) else None)
    for what, values in (("samplers", samplers), ("uniforms", uniforms), ("allowed_states", allowed_states)):
        check_names(space, what, values)
    check_shapes(space, uniforms or {}, allowed_states or {}, n)
    device = torch.device(device) if device is not None else device_of(net)
    allowed_states = {m: allowed.to(device) for m, allowed in (allowed_states or {}).items()}
    net_on_device = with_cuda_graphs(net) if device.type == "cuda" else net
    bf16 = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    batches = list(batches_of(start_index, n, batch_size))
    results, states = [], []
    with bf16, evaluating(net), progress_bar(progress, len(batches) * (steps + 1)) as advance:
        for start, size, low, high in batches:
            # samples that were not requested repeat the first or the last one
            index = torch.arange(start - start_index, start - start_index + size).clamp(0, n - 1)
            points = {m: u[index.to(u.device)].to(device) for m, u in (uniforms or {}).items()}
            rng = Rng(seed, torch.arange(start, start + size, device=device), uniforms=points)
            batch_conditions = {
                m: c.map(lambda x, index=index: select(x, index, device)) for m, c in conditions.items()
            }
            run = Run(net_on_device, space, batch_conditions, steps, guidance, samplers or {}, rng, allowed_states)
            batch_states = []
            for x in run:
                if trajectory:
                    batch_states.append({m: value[low:high].cpu() for m, value in x.items()})
                advance()
            results.append({m: value[low:high] for m, value in run.x.items()})
            states.append(batch_states)
    samples = {m: torch.cat([part[m] for part in results]) for m in space}
    if not trajectory:
        return samples
    return samples, [{m: torch.cat([part[m] for part in parts]) for m in space} for parts in zip(*states, strict=True)]


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


def check_arguments(
    space: Space,
    conditions: Mapping[str, Condition],
    n: int | None,
    steps: int,
    start_index: int,
    batch_size: int | None,
) -> int:
    """The number of samples; ValueError for arguments that do not fit the space or each other."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if start_index < 0:
        raise ValueError(f"start_index must be at least 0, got {start_index}")
    for m, c in conditions.items():
        c.check(m, space)
        n = len(c.x) if n is None else n
        if len(c.x) != n:
            raise ValueError(f"{m}: {len(c.x)} conditions for n = {n} samples")
    if len(conditions) == len(space) and all(c.mask is None for c in conditions.values()):
        raise ValueError("every modality is a condition: there is nothing to generate")
    n = 1 if n is None else n
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n


def check_names(space: Space, what: str, values: Mapping | None) -> None:
    """ValueError unless the keys are modalities of the space."""
    if unknown := set(values or {}) - set(space):
        raise ValueError(f"{what}: unknown modality {sorted(unknown)[0]!r}; this space has {', '.join(space)}")


def check_shapes(space: Space, uniforms: Mapping[str, Tensor], allowed_states: Mapping[str, Tensor], n: int) -> None:
    """ValueError unless uniforms and allowed states have the shapes of their modalities."""
    for m, u in uniforms.items():
        if tuple(u.shape) != (n, *space[m].shape):
            raise ValueError(f"uniforms: {m} needs shape {(n, *space[m].shape)}, got {tuple(u.shape)}")
    for m, allowed in allowed_states.items():
        process = space[m]
        if not isinstance(process, Discrete):
            raise ValueError(f"allowed_states: {m} is not a discrete modality")
        shape = (*process.shape, process.states)
        if tuple(allowed.shape) != shape or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed_states: {m} needs bool of shape {shape}, got {allowed.dtype} {tuple(allowed.shape)}"
            )
        if not bool(allowed.any(-1).all()):
            raise ValueError(f"allowed_states: {m} needs at least one allowed state at every position")


def batches_of(start_index: int, n: int, batch_size: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(start, size, low, high): compute samples start, …, start + size − 1 and keep low to high of them."""
    if batch_size is None:
        for start in range(start_index, start_index + n, LARGEST_BATCH):
            size = min(LARGEST_BATCH, start_index + n - start)
            yield start, size, 0, size
        return
    for start in range(start_index // batch_size * batch_size, start_index + n, batch_size):
        yield start, batch_size, max(start_index - start, 0), min(start_index + n - start, batch_size)


def select(x: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Samples of a tensor on a device, floating ones as float32."""
    x = x.to(device)[index.to(device)]
    return x.float() if x.is_floating_point() else x


def device_of(net: Net) -> torch.device:
    """The device of a network's parameters; the CPU for a plain function."""
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(net: Net) -> Iterator[None]:
    """Set all modules of a network to evaluation mode, and restore their modes afterwards."""
    training = [m for m in net.modules() if m.training] if isinstance(net, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
