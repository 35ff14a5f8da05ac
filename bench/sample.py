"""`anystate bench sample`: samples per second, evaluations, latency and memory of both engines, over batch and steps.

Both engines draw the same random numbers, and no number is printed before their samples agreed: on the CPU tokens and
pictures within rounding; in bfloat16 on a GPU a race decided within rounding may fall otherwise, and what follows then
differs, so the share of equal tokens stands in the row.
"""

from __future__ import annotations

import torch

from ..model.compiling import compile_net
from ..sample import sample
from ..train.build import build
from ..train.engine import ENGINES, sample_flops
from .rows import Rows, in_turns, quantile, workers
from .systems import config_of, made_up, shaken

EQUAL_TOKENS = {"cpu": 0.999, "cuda": 0.9}


def sampling(
    size: str,
    device: torch.device,
    rows: Rows,
    compile: str = "always",
    batches: list[int] | None = None,
    steps: list[int] | None = None,
    rounds: int = 5,
) -> None:
    """Measure one size of image-text sampling: jointly over all batches and steps, and from each modality.

    Args:
        compile: of the fast engine: always or never.
        batches, steps: what to go over, by default what the config says.
    """
    config = config_of(size, [])
    batches, steps = batches or [config.sample.chunk], steps or [config.sample.steps]
    cases = [("joint", n, count) for n in batches for count in steps]
    cases += [(m, batches[-1], steps[-1]) for m in config.modalities]
    each = {engine: (size, device, engine, compile, [*cases, ("joint", 1, steps[-1])]) for engine in ("plain", "fast")}
    found: dict[str, dict] = {}
    with workers(calls, each, together=device.type == "cpu") as groups:
        for group in groups:
            for case in [*cases, ("joint", 1, steps[-1])]:
                now = {e: {"drawn": w(f"draw {case}").result, "again": w(f"time {case}")} for e, w in group.items()}
                for engine, times in in_turns(group, f"time {case}", rounds).items():
                    now[engine]["seconds"] = quantile(times, 0.5)
                for engine, values in now.items():
                    found.setdefault(case, {})[engine] = values
    for case in cases:
        report(size, case, found[case], device, rows)
    latency = {e: 1000 * values["seconds"] for e, values in found["joint", 1, steps[-1]].items()}
    rows.add(f"sample {size}: one joint sample, {steps[-1]} steps", latency, "ms", False)


def report(size: str, case: tuple[str, int, int], found: dict[str, dict], device: torch.device, rows: Rows) -> None:
    """The rows of one case, once the engines' samples agree."""
    direction, n, steps = case
    name = f"sample {size}, {'joint' if direction == 'joint' else f'given {direction}'}, batch {n}, {steps} steps"
    drawn = {engine: values["drawn"]["samples"] for engine, values in found.items()}
    asked = found["fast"]["drawn"]["evaluations"]
    equal = agreement(name, drawn, device)
    about = {"batch": n, "steps": steps, "equal_tokens": equal, "evaluations": asked}
    about["flops"] = found["fast"]["drawn"]["flops"]
    rows.add(f"{name}: samples per second", {e: n / v["seconds"] for e, v in found.items()}, "1/s", **about)
    values = {e: 1000 * v["seconds"] / asked for e, v in found.items()}
    rows.add(f"{name}: an evaluation, guided or not", values, "ms", False, **about)
    if device.type == "cuda":
        rows.add(f"{name}: peak memory", {e: v["again"].memory for e, v in found.items()}, "GB", False, **about)


def calls(size: str, device: torch.device, engine: str, compile: str, cases: list[tuple]):
    """What a measuring process can do: "draw CASE" (samples, evaluations) and "time CASE" (nothing but the drawing)."""
    config = config_of(size, [f"engine={engine}", f"compile={compile}"])
    system = shaken(build(config, codecs=False))
    net = system.net.to(device).eval().requires_grad_(False)
    ENGINES[engine].settle(device)
    pairs = made_up(config, device)
    given = dict(zip(pairs.names, (pairs.images, pairs.captions[:, 0]), strict=True))
    flops = sample_flops(system)
    asked = []
    hook = net.register_forward_pre_hook(lambda *_: asked.append(1))

    def draw(direction: str, n: int, steps: int) -> dict:
        known = {direction: given[direction][torch.arange(n, device=device) % len(pairs)]} if direction in given else {}
        return sample(
            net,
            system.space,
            known,
            n=n,
            steps=steps,
            guidance=system.guidance(bool(known)),
            samplers=system.samplers,
            chunk=n,
            engine=engine,
            precision=system.precision(),
        )

    counts = {}
    for case in cases:  # counted before anything is compiled
        asked.clear()
        draw(*case)
        counts[case] = len(asked)
    hook.remove()
    if engine == "fast" and compile != "never":
        compile_net(net, device, demanded=True, dynamic=True)
    functions = {}
    for case in cases:
        about = {"evaluations": counts[case], "flops": flops}
        functions[f"draw {case}"] = lambda c=case, a=about: {
            "samples": {m: x.cpu().numpy() for m, x in draw(*c).items()},
            **a,
        }
        functions[f"time {case}"] = lambda c=case: draw(*c) and None
    return functions, device


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
