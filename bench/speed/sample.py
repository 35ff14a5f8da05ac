"""`anystate bench sample`: samples per second, NFE, latency and memory of ours and the reference, by batch and steps.

Both ("fast" and "plain" in results) draw the same random numbers, and their samples are compared before any time is
printed. On the CPU tokens are equal and images agree within rounding. In bfloat16 on a GPU, rounding may change a
sampled token and all that follow from it, so the share of equal tokens is stored with the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from ...kernels import LazyLogits
from ...model.compilation import compile_net
from ...model.cpu_memory import keep_memory
from ...sample import sample
from ...sample.pipeline import Pipeline, sample_flops
from ..reference import sample as reference
from .results import ResultLog
from .systems import Synthetic, config_of, untrained
from .train import ORDER
from .workers import interleave, quantile, workers

EQUAL_TOKENS = {"cpu": 0.999, "cuda": 0.9}
Case = tuple[str, int, int]  # the condition's modality, or "joint"; samples; steps


def sampling(
    size: str,
    device: torch.device,
    log: ResultLog,
    compile: str = "always",
    batches: list[int] | None = None,
    steps: list[int] | None = None,
    rounds: int = 5,
    directions: Iterable[str] | None = None,
) -> None:
    """Measure one size of image-text sampling: joint for all batches and steps, one joint sample, and conditional.

    Args:
        compile: of ours: always or never.
        batches, steps: values to measure, by default those of the config.
        directions: modalities that are the condition, default each.
    """
    config = config_of(size, [])
    batches, steps = batches or [config.sample.batch_size], steps or [config.sample.steps]
    cases = [("joint", n, count) for n in batches for count in steps] + [("joint", 1, steps[-1])]
    cases += [(m, batches[-1], steps[-1]) for m in (directions or config.modalities)]
    each = {implementation: (size, device, implementation, compile, cases) for implementation in ORDER}
    drawn: dict[Case, dict] = {case: {} for case in cases}
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            for case in cases:
                drawn[case] |= {
                    implementation: worker(f"draw {case}").result for implementation, worker in group.items()
                }
                memory = {implementation: worker(f"time {case}").memory for implementation, worker in group.items()}
                seconds = {e: quantile(times, 0.5) for e, times in interleave(group, f"time {case}", rounds).items()}
                report(size, case, drawn[case], seconds, memory, device, log)


def report(
    size: str,
    case: Case,
    drawn: dict[str, dict],
    seconds: dict[str, float],
    memory: dict[str, float | None],
    device: torch.device,
    log: ResultLog,
) -> None:
    """Log the results of one group of workers; the samples of ours and the reference must agree."""
    direction, n, steps = case
    name = f"sample {size}, {'joint' if direction == 'joint' else f'given {direction}'}, batch {n}, {steps} steps"
    evaluations = drawn["fast"]["evaluations"]
    about = {"batch": n, "steps": steps, "evaluations": evaluations, "flops": drawn["fast"]["flops"]}
    if set(drawn) >= set(ORDER):
        about["equal_tokens"] = agreement(name, {e: values["samples"] for e, values in drawn.items()}, device)
    if n == 1:
        latency = {e: 1000 * s for e, s in seconds.items()}
        log.add(f"sample {size}: one joint sample, {steps} steps", latency, "ms", False, **about)
        return
    log.add(f"{name}: samples per second", {e: n / s for e, s in seconds.items()}, "1/s", **about)
    values = {e: 1000 * s / evaluations for e, s in seconds.items()}
    log.add(f"{name}: an evaluation, guided or not", values, "ms", False, **about)
    if device.type == "cuda":
        log.add(f"{name}: peak memory", memory, "GB", False, **about)


def calls(
    size: str, device: torch.device, implementation: str, compile: str, cases: list[Case]
) -> tuple[dict[str, Callable], torch.device]:
    """The functions of a measuring process: "draw CASE" (samples, NFE) and "time CASE" (sampling alone)."""
    pipeline = untrained(size, [f"compile={compile}"]).to(device)
    net, data, flops = pipeline.net, Synthetic(pipeline.space, device), sample_flops(pipeline)
    if implementation == "fast" and device.type == "cpu":
        keep_memory()
    if implementation == "fast" and compile != "never":
        compile_net(net, device, demanded=True, dynamic=True)

    def draw(direction: str, n: int, steps: int, used: Callable = net) -> dict:
        rows = torch.arange(n, device=device) % len(data)
        conditions = {m: x[rows] for m, x in data.x.items() if m == direction}
        guidance = pipeline.guidance(bool(conditions))
        if implementation == "plain" and used is net:
            own = {m: (s.method_of(pipeline.space[m]), s.time_grid) for m, s in pipeline.samplers.items()}
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=pipeline.precision() == "bf16")
            with bf16:
                return reference.sample(net, pipeline.space, conditions, n, steps, own, guidance, device=device)
        options = {"samplers": pipeline.samplers, "precision": pipeline.precision(), "batch_size": n, "device": device}
        return sample(used, pipeline.space, conditions, n=n, steps=steps, guidance=guidance, **options)

    functions = {}
    for case in cases:
        evaluations: list[int] = []
        draw(*case, used=counting_net(pipeline, evaluations))
        about = {"evaluations": len(evaluations), "flops": flops}
        functions[f"draw {case}"] = functools.partial(drawn_by, draw, case, about)
        functions[f"time {case}"] = lambda case=case: draw(*case) and None
    return functions, device


def drawn_by(draw: Callable, case: Case, about: dict) -> dict:
    """The samples of a case as arrays, with facts about it."""
    return {"samples": {m: x.cpu().numpy() for m, x in draw(*case).items()}, **about}


def counting_net(pipeline: Pipeline, calls: list[int]) -> Callable[..., dict]:
    """A network that returns zeros and appends to `calls` at every evaluation."""

    def zeros(x, t, mask=None, outputs=None) -> dict:
        calls.append(1)
        out = {}
        for m, value in x.items():
            if value.is_floating_point():
                out[m] = torch.zeros_like(value)
            else:
                head = pipeline.net.head[m].linear
                hidden = head.weight.new_zeros(*value.shape, head.in_features)
                out[m] = LazyLogits(hidden, head.weight, head.bias)
        return out if outputs is None else {m: out[m] for m in outputs}

    return zeros


def agreement(name: str, drawn: dict[str, dict], device: torch.device) -> float:
    """The share of equal tokens; ValueError if samples of ours and of the reference differ."""
    share, differences = 1.0, {}
    for m, fast in drawn["fast"].items():
        plain = drawn["plain"][m]
        if fast.dtype.kind == "i":
            share = min(share, float((fast == plain).mean()))
        else:
            differences[m] = float(abs(fast - plain).max())
    if share < EQUAL_TOKENS[device.type]:
        raise ValueError(f"{name}: only {share:.1%} of the tokens agree with the reference")
    for m, largest in differences.items():
        if device.type == "cpu" and share == 1.0 and largest > 0.05:
            raise ValueError(f"{name}: {m} differs from the reference by {largest:.3g}")
    return share
