"""`anystate bench sample`: samples per second, evaluations, latency and memory of both engines, over batch and steps.

Both engines draw the same random numbers, and no number of the second engine is printed before their samples agreed: on
the CPU tokens and pictures within rounding; in bfloat16 on a GPU a race decided within rounding may fall otherwise, and
what follows then differs, so the share of equal tokens stands in the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from ...kernels import LazyLogits
from ...model.compilation import compile_net
from ...model.cpu_memory import keep_memory
from ...sample import sample
from ...sample.pipeline import Pipeline, build_pipeline, sample_flops
from ..reference import sample as reference
from .results import ResultLog
from .systems import config_of, made_up, shaken
from .train import ORDER
from .workers import interleave, quantile, workers

EQUAL_TOKENS = {"cpu": 0.999, "cuda": 0.9}
Case = tuple[str, int, int]  # what is given, or "joint"; samples; steps


def sampling(
    size: str,
    device: torch.device,
    rows: ResultLog,
    compile: str = "always",
    batches: list[int] | None = None,
    steps: list[int] | None = None,
    rounds: int = 5,
    directions: Iterable[str] | None = None,
) -> None:
    """Measure one size of image-text sampling: jointly over all batches and steps, one sample, and from modalities.

    Args:
        compile: of the fast engine: always or never.
        batches, steps: what to go over, by default what the config says.
        directions: what is given, default each modality.
    """
    config = config_of(size, [])
    batches, steps = batches or [config.sample.batch_size], steps or [config.sample.steps]
    cases = [("joint", n, count) for n in batches for count in steps] + [("joint", 1, steps[-1])]
    cases += [(m, batches[-1], steps[-1]) for m in (directions or config.modalities)]
    each = {engine: (size, device, engine, compile, cases) for engine in ORDER}
    drawn: dict[Case, dict] = {case: {} for case in cases}
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            for case in cases:
                drawn[case] |= {engine: worker(f"draw {case}").result for engine, worker in group.items()}
                memory = {engine: worker(f"time {case}").memory for engine, worker in group.items()}
                seconds = {e: quantile(times, 0.5) for e, times in interleave(group, f"time {case}", rounds).items()}
                report(size, case, drawn[case], seconds, memory, device, rows)


def report(
    size: str,
    case: Case,
    drawn: dict[str, dict],
    seconds: dict[str, float],
    memory: dict[str, float | None],
    device: torch.device,
    rows: ResultLog,
) -> None:
    """The rows of the engines that were timed, once the samples of all that have drawn agree."""
    direction, n, steps = case
    name = f"sample {size}, {'joint' if direction == 'joint' else f'given {direction}'}, batch {n}, {steps} steps"
    evaluations = drawn["fast"]["evaluations"]
    about = {"batch": n, "steps": steps, "evaluations": evaluations, "flops": drawn["fast"]["flops"]}
    if set(drawn) >= set(ORDER):
        about["equal_tokens"] = agreement(name, {e: values["samples"] for e, values in drawn.items()}, device)
    if n == 1:
        latency = {e: 1000 * s for e, s in seconds.items()}
        rows.add(f"sample {size}: one joint sample, {steps} steps", latency, "ms", False, **about)
        return
    rows.add(f"{name}: samples per second", {e: n / s for e, s in seconds.items()}, "1/s", **about)
    values = {e: 1000 * s / evaluations for e, s in seconds.items()}
    rows.add(f"{name}: an evaluation, guided or not", values, "ms", False, **about)
    if device.type == "cuda":
        rows.add(f"{name}: peak memory", memory, "GB", False, **about)


def calls(
    size: str, device: torch.device, engine: str, compile: str, cases: list[Case]
) -> tuple[dict[str, Callable], torch.device]:
    """The functions of a measuring process: "draw CASE" (samples, evaluations) and "time CASE" (sampling alone)."""
    pipeline = shaken(build_pipeline(config_of(size, [f"compile={compile}"]), codecs=False))
    net = pipeline.net.to(device).eval().requires_grad_(False)
    pairs = made_up(pipeline.config, device)
    known = dict(zip(pairs.names, (pairs.images, pairs.captions[:, 0]), strict=True))
    flops = sample_flops(pipeline)
    if device.type == "cpu":
        keep_memory()
    if engine == "fast" and compile != "never":
        compile_net(net, device, demanded=True, dynamic=True)

    def draw(direction: str, n: int, steps: int, used: Callable = net) -> dict:
        conditions = {}
        if direction in known:
            conditions[direction] = known[direction][torch.arange(n, device=device) % len(pairs)]
        guidance = pipeline.guidance(bool(conditions))
        if engine == "plain" and used is net:
            own = {m: (s.method, s.time_grid) for m, s in pipeline.samplers.items()}
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=pipeline.precision() == "bf16")
            with bf16:
                return reference.sample(net, pipeline.space, conditions, n, steps, own, guidance, device=device)
        options = {"samplers": pipeline.samplers, "precision": pipeline.precision(), "batch_size": n, "device": device}
        return sample(used, pipeline.space, conditions, n=n, steps=steps, guidance=guidance, **options)

    functions = {}
    for case in cases:
        evaluations: list[int] = []
        draw(*case, used=counting(pipeline, evaluations))
        about = {"evaluations": len(evaluations), "flops": flops}
        functions[f"draw {case}"] = functools.partial(drawn_by, draw, case, about)
        functions[f"time {case}"] = lambda case=case: draw(*case) and None
    return functions, device


def drawn_by(draw: Callable, case: Case, about: dict) -> dict:
    """The samples of a case as arrays, with facts about it."""
    return {"samples": {m: x.cpu().numpy() for m, x in draw(*case).items()}, **about}


def counting(system: Pipeline, calls: list[int]):
    """A network that puts out zeros at once, and notes every evaluation."""

    def zeros(x, t, mask=None, outputs=None) -> dict:
        calls.append(1)
        out = {}
        for m, value in x.items():
            if value.is_floating_point():
                out[m] = torch.zeros_like(value)
            else:
                head = system.net.head[m].linear
                hidden = head.weight.new_zeros(*value.shape, head.in_features)
                out[m] = LazyLogits(hidden, head.weight, head.bias)
        return out if outputs is None else {m: out[m] for m in outputs}

    return zeros


def agreement(name: str, drawn: dict[str, dict], device: torch.device) -> float:
    """The share of equal tokens; ValueError if the engines disagree."""
    share, pictures = 1.0, {}
    for m, fast in drawn["fast"].items():
        plain = drawn["plain"][m]
        if fast.dtype.kind == "i":
            share = min(share, float((fast == plain).mean()))
        else:
            pictures[m] = float(abs(fast - plain).max())
    if share < EQUAL_TOKENS[device.type]:
        raise ValueError(f"{name}: only {share:.1%} of the engines' tokens agree")
    for m, worst in pictures.items():
        if device.type == "cpu" and share == 1.0 and worst > 0.05:
            raise ValueError(f"{name}: {m} of the two engines differs by {worst:.3g}")
    return share
