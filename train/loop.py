"""One training loop, on the CPU and on a GPU.

Every random number is a function of (seed, step, sample) and every batch of (seed, step), so all there is to
resume from is the weights, their average, the optimizer and the step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..configs import schema
from ..configs.schema import Config
from ..diffusion import Times
from ..kernels import Rng
from . import checkpoint
from .build import System, build, load_data, weightings
from .data.pairs import Pairs
from .log import Log

Hook = Callable[["Trainer"], dict[str, float] | None]


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message is one line for the user."""


class Trainer:
    """Trains the system of a config into a run folder; a folder that holds a checkpoint is resumed.

    Args:
        on_sample, on_evaluate: called every `sample_every` / `eval_every` steps with the trainer; what an
            evaluation returns is logged (see `train.hooks`).
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        device: torch.device | str | None = None,
        data: tuple[Pairs, Pairs] | None = None,
        on_sample: Hook | None = None,
        on_evaluate: Hook | None = None,
        quiet: bool = False,
    ):
        self.config, self.out, self.quiet = config, Path(out), quiet
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.system: System = self.build()
        self.train_data, self.test_data = data or load_data(self.system)
        self.net = self.system.net.to(self.device).train()
        self.ema = self.build().net.to(self.device).eval().requires_grad_(False)
        self.weighting = self.weightings().to(self.device)
        self.times = Times(**config.times.model_dump())
        settings = config.train
        if settings.batch % settings.accumulate:
            raise ValueError(f"train.accumulate = {settings.accumulate} does not divide train.batch = {settings.batch}")
        self.parameters = [*self.net.parameters(), *self.weighting.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        bf16 = settings.precision == "bf16" or (settings.precision == "auto" and self.device.type == "cuda")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.on_sample, self.on_evaluate = on_sample, on_evaluate
        self.step = 0
        self.seconds = self.seconds_here = 0.0  # spent training: in all, and by this process
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._resume()

    def build(self) -> System:
        """A new system of the config; called once for the weights that learn and once for their average."""
        return build(self.config)

    def weightings(self) -> nn.ModuleDict:
        return weightings(self.config, self.system.space)

    def losses(self, x0: dict[str, Tensor], t: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        """{modality: (B,) unweighted loss} of clean data at its times."""
        return self.system.space.losses(self.net, x0, t, rng, list(self.net.head))

    def run(self, stop: int | None = None) -> System:
        """Train up to step `stop` (default: the configured number) and return the system with its EMA weights.

        Raises:
            NonFiniteLoss: a loss was not finite; checkpoints hold the state before.
            CheckpointError: the disk refused a checkpoint.
        """
        settings, stop = self.config.train, self.config.train.steps if stop is None else stop
        with Log(self.out, self.config, self.step, stop, self.quiet) as log:
            began, since = time.perf_counter(), self.step
            while self.step < stop:
                tick = time.perf_counter()
                losses = self.update()
                self.step += 1
                self.seconds += (spent := time.perf_counter() - tick)
                self.seconds_here += spent
                if self._due(settings.log_every, stop):
                    seconds = time.perf_counter() - began
                    rate = (self.step - since) * settings.batch / seconds
                    values = {f"loss/{m}": float(v) for m, v in losses.items()}
                    self._check_finite(values)
                    now = {"lr": self.lr(self.step - 1), "grad_norm": float(self.grad_norm), "samples_per_second": rate}
                    log.write(self.step, {**values, **now})
                    began, since = time.perf_counter(), self.step
                log.advance()
                if self.on_evaluate and self._due(settings.eval_every, stop):
                    log.write(self.step, self.on_evaluate(self) or {})
                if self.on_sample and self._due(settings.sample_every, stop):
                    self.on_sample(self)
                if self._due(settings.save_every, stop):
                    self.save()
        return self.averaged()

    def update(self) -> dict[str, Tensor]:
        """One optimizer step; returns the unweighted loss per modality, on the device."""
        settings = self.config.train
        self.optimizer.param_groups[0]["lr"] = self.lr(self.step)
        part = settings.batch // settings.accumulate
        sums: dict[str, Tensor] = {}
        for i in range(settings.accumulate):
            rows = range(i * part, (i + 1) * part)
            for m, value in self.backward(rows).items():
                sums[m] = sums.get(m, 0.0) + value
        limit = math.inf if settings.clip is None else settings.clip
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return sums

    def backward(self, rows: range) -> dict[str, Tensor]:
        """Add the gradients of some rows of the current batch; returns their share of the mean losses."""
        config, space = self.config, self.system.space
        x0 = self.train_data.batch(config.seed, self.step, rows, config.train.batch)
        x0 = {m: value.to(self.device, non_blocking=True) for m, value in x0.items()}
        rng = Rng(config.seed, torch.arange(rows.start, rows.stop, device=self.device), self.step)
        t, learns = self.times(space, rng)
        with self.autocast:
            losses = self.losses(x0, t, rng)
        weighted = {m: (self.weighting[m](loss, t[m]) * learns[m]).sum() for m, loss in losses.items()}
        total = sum(weighted.values()) / config.train.batch
        self.finite &= torch.isfinite(total.detach())
        total.backward()
        learning = {m: (loss.detach() * learns[m]).sum() for m, loss in losses.items()}
        share = {m: config.train.batch * (1.0 - self.times.hold.get(m, 0.0)) for m in losses}
        return {m: value / share[m] for m, value in learning.items() if share[m] > 0}

    def lr(self, step: int) -> float:
        """Learning rate of the update that starts at `step`: linear warm-up, then the configured course."""
        settings = self.config.train
        if step < settings.warmup:
            return settings.lr * (step + 1) / settings.warmup
        done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
        if settings.decay == "cosine":
            return settings.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return settings.lr * (max(1.0 - done, 0.0) if settings.decay == "linear" else 1.0)

    def save(self) -> Path:
        """Write a checkpoint of the current step; see `train.checkpoint`."""
        return checkpoint.save_checkpoint(self.out, self.step, self.files(), self.config.train.keep)

    def files(self) -> dict[str, bytes]:
        """What a checkpoint holds, {relative name: content}."""
        self._check_finite({})
        state = {"step": self.step, "seconds": self.seconds}
        return {
            "model.safetensors": checkpoint.pack(self.net.state_dict()),
            "ema.safetensors": checkpoint.pack(self.ema.state_dict()),
            "config.yaml": schema.dump(self.config).encode(),
            "train_state/optimizer.safetensors": checkpoint.pack(checkpoint.optimizer_tensors(self.optimizer)),
            "train_state/weighting.safetensors": checkpoint.pack(self.weighting.state_dict()),
            "train_state/state.json": checkpoint.pack_json(state),
        }

    def averaged(self) -> System:
        """The system with the averaged weights, for sampling."""
        return dataclasses.replace(self.system, net=self.ema)

    def _resume(self) -> None:
        folder = checkpoint.latest(self.out)
        if folder is None:
            self.ema.load_state_dict(self.net.state_dict())
            return
        self._check_same_run(folder)
        checkpoint.load_weights(self.net, folder / "model.safetensors")
        checkpoint.load_weights(self.ema, folder / "ema.safetensors")
        checkpoint.load_weights(self.weighting, folder / "train_state/weighting.safetensors")
        checkpoint.restore_optimizer(
            self.optimizer, checkpoint.read_tensors(folder / "train_state/optimizer.safetensors")
        )
        state = json.loads((folder / "train_state/state.json").read_text())
        self.step, self.seconds = state["step"], state["seconds"]

    def _check_same_run(self, folder: Path) -> None:
        """Only `train` and `sample` settings may change between a run and its continuation."""
        saved = schema.load(folder / "config.yaml", model=type(self.config)).model_dump(mode="json")
        wanted = self.config.model_dump(mode="json")
        for key, value in wanted.items():
            if key not in ("train", "sample") and value != saved[key]:
                raise checkpoint.CheckpointError(
                    f"{self.out} holds a run with another {key!r}: choose another --out, or delete it to start anew"
                )

    @torch.no_grad()
    def _average(self) -> None:
        """EMA with a short memory at first: decay min(ema, (1 + n)/(10 + n))."""
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1.0 - decay)

    def _due(self, every: int | None, stop: int) -> bool:
        return every is not None and (self.step % every == 0 or self.step == stop)

    def _check_finite(self, values: dict[str, float]) -> None:
        if bool(self.finite) and all(math.isfinite(v) for v in values.values()):
            return
        last = checkpoint.latest(self.out)
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise NonFiniteLoss(f"the loss is not finite at or before step {self.step}; {where}; try a lower train.lr")
