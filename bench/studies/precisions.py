"""`anystate bench precisions`: training in fp8 beside bf16 and fp32, with the same seed, data, times and noise.

Written per precision: the mean training loss of every tenth of the steps, the losses on held-out data and the quality
of samples of the EMA weights (`quality.hooks.evaluate`). On a device without fp8 products are emulated.

Small networks are converted too: with the widths of digits fp8 gains no time, but its rounding is the same as in wide
ones, and sums over fewer numbers average less of it away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ...configs.load import load_config
from ...model import float8
from ...train.trainer import Trainer
from ..quality.hooks import evaluate
from ..speed.results import ResultLog

PRECISIONS = ("fp32", "bf16", "fp8")
PARTS = 10  # of a training run, with a mean loss each
TOLERANCE = 0.02  # relative, of the mean training losses of the last part: fp8 beside bf16


def compare_precisions(
    source: str,
    overrides: list[str],
    steps: int,
    precisions: list[str],
    out: Path,
    log: ResultLog,
    device: torch.device,
) -> None:
    """Train a config in every precision, and measure it.

    Raises:
        ValueError: the losses of fp8 and bf16 differ by more than TOLERANCE; results are kept.
    """
    for precision in precisions:
        config = load_config(source, [*overrides, f"train.steps={steps}", f"train.precision={precision}"])
        with every_layer(device) if precision == "fp8" else contextlib.nullcontext():
            trainer = Trainer(config, out / precision, device, quiet=True)
        about = {"config": source, "overrides": overrides, "steps": steps}
        if precision == "fp8":
            about["layers"] = sum(isinstance(module, float8.Float8Linear) for module in trainer.state.net.modules())
        for i, losses in enumerate(losses_of_parts(trainer, steps), 1):
            for m, loss in losses.items():
                name = f"{config.name}: training loss of {m}, steps to {i * steps // PARTS}"
                log.add(name, {precision: float(loss)}, "", False, **about)
        for metric, value in evaluate(trainer).items():
            log.add(f"{config.name}: {metric}", {precision: value}, "", not metric.startswith("held_out"), **about)
    if {"bf16", "fp8"} <= set(precisions):
        check(log, f"{config.name}: training loss of", f"steps to {steps}")


@contextlib.contextmanager
def every_layer(device: torch.device) -> Iterator[None]:
    """Layers of the blocks are converted to fp8 whatever their size, emulated where the device has no fp8."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= float8.MIN_CAPABILITY
    emulation = {} if has_fp8 else {float8.EMULATE: "1"}
    with mock.patch.object(float8, "MIN_SIZE", 0), mock.patch.dict(os.environ, emulation):
        yield


def losses_of_parts(trainer: Trainer, steps: int) -> Iterator[dict[str, Tensor]]:
    """Train to the end; {process: mean loss} of every part of the run."""
    ends = {i * steps // PARTS for i in range(1, PARTS + 1)}
    since: list[dict[str, Tensor]] = []
    while trainer.state.step < steps:
        since.append(trainer.update())
        trainer.state.step += 1
        if trainer.state.step in ends:
            yield {m: torch.stack([torch.as_tensor(losses[m]) for losses in since]).mean() for m in since[0]}
            since = []


def check(log: ResultLog, prefix: str, suffix: str) -> None:
    """Raise ValueError if a loss of the last part in fp8 differs from that in bf16."""
    for name in sorted({result.name for result in log.results}):
        if name.startswith(prefix) and name.endswith(suffix):
            found = log.find(name)
            apart = abs(found["fp8"] / found["bf16"] - 1.0)
            if apart > TOLERANCE:
                raise ValueError(f"{name}: fp8 differs from bf16 by {apart:.1%}; allowed {TOLERANCE:.0%}")
