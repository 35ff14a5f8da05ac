"""Any part from any other: joint, conditional and partly-noised sampling.

Algorithms 3 to 5 of Diffuse Everything (arXiv 2506.07903): a condition stays at its noise time, every other modality
follows its own time grid from noise to data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..diffusion.guidance import Guidance
from ..diffusion.processes import Discrete
from ..diffusion.space import Net, Space
from ..kernels import Rng
from .bf16_weights import Bf16Weights
from .condition import Condition
from .cuda_graphs import SamplingGraphs, graphs_of
from .progress import progress_bar
from .run import Run
from .steppers import Sampler

LARGEST_BATCH = 256  # samples at a time by default


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
    indices: Tensor | None = None,
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
        indices: (n,) int64, the numbers of the samples in the place of start_index, …
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
    graphs = graphs_of(net, space, device)
    bf16 = in_bf16(net, device, graphs) if precision == "bf16" else contextlib.nullcontext()
    batches = list(batches_of(start_index, n, batch_size))
    results, states = [], []
    with bf16, evaluating(net), progress_bar(progress, len(batches) * (steps + 1)) as advance:
        for start, size, low, high in batches:
            # samples that were not requested repeat the first or the last one
            index = torch.arange(start - start_index, start - start_index + size).clamp(0, n - 1)
            points = {m: u[index.to(u.device)].to(device) for m, u in (uniforms or {}).items()}
            numbers = torch.arange(start, start + size, device=device)
            if indices is not None:
                numbers = indices[index.to(indices.device)].to(device)
            rng = Rng(seed, numbers, uniforms=points)
            batch_conditions = {
                m: c.map(lambda x, index=index: select(x, index, device)) for m, c in conditions.items()
            }
            run = Run(net, space, batch_conditions, steps, guidance, samplers or {}, rng, allowed_states)
            run, update = (run, run.update) if graphs is None else graphs.adopt(run)
            batch_states = []
            for x in run.states(update):
                if trajectory:
                    batch_states.append({m: value[low:high].to("cpu", copy=True) for m, value in x.items()})
                advance()
            results.append({m: value[low:high].clone() for m, value in run.x.items()})
            states.append(batch_states)
    samples = {m: torch.cat([part[m] for part in results]) for m in space}
    if not trajectory:
        return samples
    return samples, [{m: torch.cat([part[m] for part in parts]) for m in space} for parts in zip(*states, strict=True)]


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
def in_bf16(net: Net, device: torch.device, graphs: SamplingGraphs | None) -> Iterator[None]:
    """Evaluate a network in bfloat16; graphs keep its weights in bfloat16, which they read."""
    weights = None if graphs is None else graphs.weights
    if weights is None and isinstance(net, torch.nn.Module):
        weights = Bf16Weights(net)
    if graphs is not None:
        graphs.weights = weights
    with torch.autocast(device.type, torch.bfloat16), contextlib.nullcontext() if weights is None else weights.used():
        yield


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
