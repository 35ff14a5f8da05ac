"""One training loop, on the CPU and on a GPU.

Every random number is a function of (seed, step, sample) and every batch of (seed, step), so all there is to
resume from is the weights, their average, the optimizer and the step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..configs.config import Config
from ..configs.load import dump_config, load_config
from ..configs.runs import CheckpointError, latest
from ..diffusion import TimeSampler
from ..kernels import Rng
from ..model import distributed
from ..model.storage import load_weights, pack, pack_json, read_tensors, save_checkpoint
from ..sample.cuda_graphs import release
from ..sample.pipeline import Pipeline, build_pipeline, sample_flops
from . import checkpoint, sharded
from .checkpoint import init_from, init_optimizer_state
from .data.load import load_data
from .data.pairs import Pairs
from .engine import ENGINES
from .metric_log import Log, Silent
from .objective import Objective, weightings

Hook = Callable[["Trainer"], dict[str, float] | None]


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message is one line for the user."""


class Trainer:
    """Trains the system of a config into a run folder; a folder that holds a checkpoint is resumed.

    Under torchrun every rank makes one of these and computes its own contiguous rows of each batch; times, noise and
    data depend on the row's place in the batch alone, so the number of ranks changes nothing but rounding.

    Args:
        on_sample, on_evaluate: called on the main rank every `sample_every` / `eval_every` steps with the trainer;
            what an evaluation returns is logged (see `train.hooks`).
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
        self.device = distributed.start(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.rows = self._own_rows()
        self.system: Pipeline = self.build()
        self.train_data, self.test_data = data or load_data(self.system, self.out / "bad_samples.jsonl")
        self.net = self.system.net.to(self.device).train()
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.weighting = self.weightings().to(self.device)
        self.times = TimeSampler(**config.times.model_dump())
        settings = config.train
        self.started_from = self._start()
        for name in settings.freeze:
            for module in self.net.part(name):
                module.requires_grad_(False)
        self.net.recompute = settings.activation_checkpointing
        bf16 = self.in_bf16()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.sharded = settings.parallel == "fsdp" and distributed.world() > 1
        self.engine = ENGINES[config.engine](config, self.device)
        self.engine.prepare(self.net, self.work, self.sharded)
        self.objective = self._objective(bf16)
        self.parameters = [p for p in [*self.net.parameters(), *self.weighting.parameters()] if p.requires_grad]
        self.optimizer = self.engine.optimizer(self)
        self.on_sample, self.on_evaluate = on_sample, on_evaluate
        self.step = 0
        self.seconds = self.seconds_here = 0.0  # spent training: in all, and by this process
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._gathered: nn.Module | None = None
        self._resume()

    def build(self) -> Pipeline:
        """A new system of the config."""
        return build_pipeline(self.config)

    def in_bf16(self) -> bool:
        """Whether the network's matrix products are computed in bfloat16; train.precision=auto: on a GPU."""
        setting = self.config.train.precision
        return setting in ("bf16", "fp8") or (setting == "auto" and self.device.type == "cuda")

    def weightings(self) -> nn.ModuleDict:
        return weightings(self.config, self.system.space)

    def losses(self, x0: dict[str, Tensor], t: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        """{modality: (B,) unweighted loss} of clean data at its times."""
        return self.system.space.losses(self.engine.net(self.net), x0, t, rng, self.learned())

    def work(self) -> float:
        """FLOPs of the whole run; a backward pass takes two forward ones."""
        return 3.0 * sample_flops(self.system) * self.config.train.batch * self.config.train.steps

    def learned(self) -> list[str]:
        """The modalities that have a head and a loss."""
        return [m for m in self.net.head if self.config.modalities[m].loss.scale > 0]

    def run(self, stop: int | None = None) -> Pipeline:
        """Train up to step `stop` (default: the configured number) and return the system with its EMA weights.

        Raises:
            NonFiniteLoss: a loss was not finite; checkpoints hold the state before.
            CheckpointError: the disk refused a checkpoint.
        """
        settings, stop = self.config.train, self.config.train.steps if stop is None else stop
        with Log(self.out, self.config, self.step, stop, self.quiet) if distributed.is_main() else Silent() as log:
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
                    mean = distributed.sum_over_ranks(torch.stack(list(losses.values()))).tolist()
                    values = {f"loss/{m}": value for m, value in zip(losses, mean, strict=True)}
                    self._check_finite(values)
                    now = {"lr": self.lr(self.step - 1), "grad_norm": float(self.grad_norm), "samples_per_second": rate}
                    log.write(self.step, {**values, **now})
                    began, since = time.perf_counter(), self.step
                log.advance()
                if self.on_evaluate and self._due(settings.eval_every, stop):
                    log.write(self.step, self._on_main(self.on_evaluate) or {})
                if self.on_sample and self._due(settings.sample_every, stop):
                    self._on_main(self.on_sample)
                if self._due(settings.save_every, stop):
                    self.save()
        return self.averaged()

    def update(self) -> dict[str, Tensor]:
        """One optimizer step; returns this rank's share of the mean unweighted loss per modality, on the device."""
        with self.engine.running():
            losses = self.engine.update(self)
            self.engine.report(losses)
        return losses

    def step_by_step(self) -> dict[str, Tensor]:
        """`update` without a graph."""
        settings = self.config.train
        self.engine.set_lr(self.optimizer, self.lr(self.step))
        x0 = self.train_data.batch(self.config.seed, self.step, self.rows, settings.batch)
        part = len(self.rows) // settings.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}
        for i in range(settings.gradient_accumulation_steps):
            rows = slice(i * part, (i + 1) * part)
            last = i == settings.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last else self._without_sync():
                for m, value in self.backward({m: x[rows] for m, x in x0.items()}, self.rows[rows]).items():
                    sums[m] = sums.get(m, 0.0) + value
        if settings.on_nonfinite_grad == "zero":
            for p in self.parameters:
                if p.grad is not None:
                    torch.nan_to_num_(*sharded.local([p.grad]), nan=0.0, posinf=0.0, neginf=0.0)
        self.grad_norm = sharded.whole(self.descend())
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return sums

    def descend(self) -> Tensor:
        """Clip the gradients and let the optimizer step; returns the gradients' norm before."""
        limit = math.inf if self.config.train.max_grad_norm is None else self.config.train.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        self.optimizer.step()
        return norm

    def backward(self, x0: dict[str, Tensor], rows: range, rng: Rng | None = None) -> dict[str, Tensor]:
        """Add the gradients of these rows of the current batch; returns their share of the mean losses."""
        config = self.config
        x0 = {m: value.to(self.device, non_blocking=True) for m, value in x0.items()}
        rng = rng or Rng(config.seed, torch.arange(rows.start, rows.stop, device=self.device), self.step)
        t, loss_mask = self.times(self.system.space, rng)
        with self.autocast:
            total, losses = self.objective(x0, t, loss_mask, rng)
        total = total / config.train.batch
        if config.train.on_nonfinite_grad == "stop":
            self.finite &= torch.isfinite(total.detach())
        (total * distributed.world()).backward()  # ranks average their gradients; the loss is a sum over ranks
        learning = {m: (loss * loss_mask[m]).sum() for m, loss in losses.items()}
        share = {m: config.train.batch * (1.0 - self.times.hold.get(m, 0.0)) for m in losses}
        return {m: value / share[m] for m, value in learning.items() if share[m] > 0}

    def lr(self, step: int) -> float:
        """Learning rate of the update that starts at `step`: linear warm-up, then the configured course."""
        settings = self.config.train
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / settings.warmup_steps
        done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
        if settings.lr_schedule == "cosine":
            return settings.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return settings.lr * (max(1.0 - done, 0.0) if settings.lr_schedule == "linear" else 1.0)

    def save(self) -> Path:
        """Write a checkpoint of the current step; see `train.checkpoint`. Every rank must call this."""
        files = self.files()
        shards = (lambda folder: sharded.save(folder, self._tensors())) if self.sharded else None
        return save_checkpoint(self.out, self.step, files, self.config.train.keep_last, shards)

    def files(self) -> dict[str, bytes]:
        """What a checkpoint holds, {relative name: content}; on the main rank alone, though all must call this."""
        self._check_finite({})
        weights = {
            "model.safetensors": self._whole(self.net),
            "ema.safetensors": self._whole(self.ema),
            "train_state/weighting.safetensors": self._whole(self.weighting),
        }
        if not self.sharded:
            weights["train_state/optimizer.safetensors"] = checkpoint.optimizer_tensors(self.optimizer)
        if not distributed.is_main():
            return {}
        state = {"step": self.step, "seconds": self.seconds}
        return {
            **{name: pack(tensors) for name, tensors in weights.items()},
            **self.system.files(),
            "config.yaml": dump_config(self.config).encode(),
            "train_state/state.json": pack_json(state),
        }

    def averaged(self) -> Pipeline:
        """The system with the averaged weights, for sampling; with sharded weights every rank must call this."""
        if self.sharded and self._gathered is None:
            net = self.build().net.to(self.device).eval().requires_grad_(False)
            net.load_state_dict(self._whole(self.ema))
            return dataclasses.replace(self.system, net=net)
        return dataclasses.replace(self.system, net=self._gathered or self.ema)

    def _own_rows(self) -> range:
        """The rows of every batch that this rank computes."""
        settings, ranks = self.config.train, distributed.world()
        if settings.batch % (ranks * settings.gradient_accumulation_steps):
            parts = f"train.gradient_accumulation_steps = {settings.gradient_accumulation_steps}" + (f" times {ranks} ranks" if ranks > 1 else "")
            raise ValueError(f"{parts} does not divide train.batch = {settings.batch}")
        return distributed.share(settings.batch)

    def _objective(self, bf16: bool) -> nn.Module:
        """The objective as it is, or wrapped for several ranks."""
        objective = Objective(self.net, self.weighting, self.losses)
        if distributed.world() == 1:
            return objective
        if self.sharded:
            sharded.shard(objective, bf16)
            sharded.shard(self.ema, bf16=False)
            return objective
        device = [self.device] if self.device.type == "cuda" else None
        idle = set(self.learned()) != set(self.system.space)  # a stream without an output leaves weights unused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers
            return DistributedDataParallel(
                objective, device, broadcast_buffers=False, find_unused_parameters=idle, gradient_as_bucket_view=True
            )

    def _without_sync(self):
        """Gradients stay on this rank: for all but the last part of a batch."""
        wrapped = isinstance(self.objective, DistributedDataParallel)
        return self.objective.no_sync() if wrapped else contextlib.nullcontext()

    def _on_main(self, hook: Hook) -> dict[str, float] | None:
        """Call a hook on the main rank, with whole weights, while the others wait."""
        self._gathered = self.averaged().net if self.sharded else None
        values = hook(self) if distributed.is_main() else None
        release(self._gathered or self.ema)
        self._gathered = None
        distributed.barrier()
        return values

    def _whole(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: sharded.whole(value) for name, value in module.state_dict().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """All that a run resumes from, {name: tensor}, in whatever way it lies on the ranks."""
        parts = {"model": self.net, "ema": self.ema, "weighting": self.weighting}
        tensors = {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
        slots = checkpoint.optimizer_tensors(self.optimizer)
        return {**tensors, **{f"optimizer.{name}": x for name, x in slots.items()}}

    def _start(self) -> str:
        """Weights to begin with, where the folder holds no checkpoint yet; returns what was done, in a line."""
        init, done = self.config.init, "fresh weights"
        if init is not None and latest(self.out) is None:
            done = init_from(self.net, init.checkpoint, init.weights)
        self.ema.load_state_dict(self.net.state_dict())
        return done

    def _resume(self) -> None:
        folder = latest(self.out)
        if folder is None:
            return
        self._check_same_run(folder)
        shards = folder / sharded.FOLDER
        if shards.is_dir():
            init_optimizer_state(self.optimizer, self.parameters)
            tensors, there = self._tensors(), sharded.names(shards)
            sharded.load(shards, {name: x for name, x in tensors.items() if name in there})
        elif self.sharded:
            raise CheckpointError(
                f"{folder} was not saved with train.parallel=fsdp: go on with train.parallel=ddp, or begin another "
                f"--out with init.checkpoint={folder}"
            )
        else:
            load_weights(self.net, folder / "model.safetensors")
            load_weights(self.ema, folder / "ema.safetensors")
            load_weights(self.weighting, folder / "train_state/weighting.safetensors")
            slots = read_tensors(folder / "train_state/optimizer.safetensors")
            checkpoint.restore_optimizer(self.optimizer, slots)
        state = json.loads((folder / "train_state/state.json").read_text())
        self.step, self.seconds = state["step"], state["seconds"]

    def _check_same_run(self, folder: Path) -> None:
        """How it runs (`engine`, `compile`), `train` and `sample` may change between a run and its continuation."""
        saved = load_config(folder / "config.yaml", model=type(self.config)).model_dump(mode="json")
        wanted = self.config.model_dump(mode="json")
        for key, value in wanted.items():
            if key not in ("train", "sample", "engine", "compile") and value != saved[key]:
                raise CheckpointError(
                    f"{self.out} holds a run with another {key!r}: choose another --out, or delete it to start anew"
                )

    @torch.no_grad()
    def _average(self) -> None:
        self.engine.average(self.ema, self.net, 1.0 - self.decay())

    def decay(self) -> float:
        """Of the average in this step, with a short memory at first: min(ema, (1 + n)/(10 + n))."""
        return min(self.config.train.ema, (1 + self.step) / (10 + self.step))

    def _due(self, every: int | None, stop: int) -> bool:
        return every is not None and (self.step % every == 0 or self.step == stop)

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = distributed.sum_over_ranks((~self.finite).float())
        if not bad and (self.config.train.on_nonfinite_grad == "zero" or all(math.isfinite(v) for v in values.values())):
            return
        last = latest(self.out)
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise NonFiniteLoss(f"the loss is not finite at or before step {self.step}; {where}; try a lower train.lr")
