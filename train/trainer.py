"""The training loop, on the CPU and on a GPU.

Every random number is a function of (seed, step, sample) and every batch of (seed, step), so a run resumes from its
weights, their EMA, the optimizer's state and the step alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..configs.config import Config
from ..configs.interruption import Interrupted, StopRequest, stop_request
from ..configs.load import dump_config, load_config
from ..configs.runs import CheckpointError, latest
from ..diffusion import TimeSampler
from ..kernels import Rng
from ..model import distributed, float8
from ..model.build import Codecs, build_codecs, build_losses
from ..model.compilation import compile_net, has_compiler, should_compile
from ..model.cpu_memory import deterministic, keep_memory
from ..model.storage import save_checkpoint
from ..sample.cuda_graphs import release
from ..sample.pipeline import Pipeline, build_pipeline, sample_flops
from . import sharded
from .checkpoint import checkpoint_files, init_from, resume, state_tensors, whole_tensors
from .data.dataset import Dataset
from .data.examples import Examples
from .data.load import TrainingData, encode_split, load_data
from .graph_step import graph_step, is_capturable, with_graph_optimizer
from .metric_log import MetricLog, NullLog
from .objective import Objective, weightings
from .state import TrainState
from .step import learning_rate, training_step

Hook = Callable[["Trainer"], dict[str, float] | None]


class NonFiniteLoss(FloatingPointError):
    """Training diverged; the message is one line for the user."""


class Trainer:
    """Trains the pipeline of a config into a run folder; a folder that holds a checkpoint is resumed.

    Under torchrun every rank makes one of these and computes its own contiguous rows of each batch; times, noise and
    data depend on the row's index in the batch alone, so the number of ranks changes nothing but rounding.

    Args:
        data: training and held-out data sets, or already encoded; default what the config names. Codecs that must be
            fitted are fitted on the former.
        on_sample, on_evaluate: called on the main rank every `sample_every` / `eval_every` steps with the trainer;
            what an evaluation returns is logged (see `bench.quality.hooks`).
        codecs: {modality: codec}; default new ones.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        device: torch.device | str | None = None,
        data: tuple[Dataset, Dataset] | tuple[TrainingData, Examples] | None = None,
        on_sample: Hook | None = None,
        on_evaluate: Hook | None = None,
        quiet: bool = False,
        codecs: Codecs | None = None,
    ):
        self.config, self.out, self.quiet = config, Path(out), quiet
        self.device = distributed.start(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cpu":
            keep_memory()
        rows = self._own_rows()
        self.codecs = build_codecs(config) if codecs is None else codecs
        self.train_data, self.test_data = self._load(data)
        self.pipeline = self.build()
        net = self.pipeline.net.to(self.device).train()
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.sharded = config.train.parallel == "fsdp" and distributed.world() > 1
        self.started_from = self._init_weights(net, ema)
        as_graph = is_capturable(config.train, net, self.train_data, self.device)
        compiled = self._prepare(net, as_graph)
        module = self.objective(net).to(self.device)
        objective = self._distribute(module, ema)
        settings = config.train
        self.state = TrainState(
            settings=settings,
            seed=config.seed,
            device=self.device,
            space=self.pipeline.space,
            times=self._times(),
            net=net,
            ema=ema,
            module=module,
            objective=objective,
            optimizer=torch.optim.AdamW(
                [p for p in module.parameters() if p.requires_grad],
                settings.lr,
                settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,
            ),
            data=self.train_data,
            rows=rows,
            bf16=self.in_bf16(),
            compiled=compiled and as_graph,
        )
        if as_graph:
            with_graph_optimizer(self.state)
        self.on_sample, self.on_evaluate = on_sample, on_evaluate
        self.seconds = self.seconds_here = 0.0  # spent training: in all, and by this process
        self._step: Callable[[], dict[str, Tensor]] | None = None
        self._gathered: nn.Module | None = None
        folder = latest(self.out)
        if folder is not None:
            self.check_same_run(folder)
            self.seconds = resume(self.state, folder, self.sharded)

    def build(self) -> Pipeline:
        """A new pipeline of the config."""
        return build_pipeline(self.config, self.codecs)

    def objective(self, net: nn.Module) -> Objective:
        """The loss of the config."""
        pipeline = self.pipeline
        losses = build_losses(self.config, pipeline.space, pipeline.names)
        weighting = weightings(losses, pipeline.space)
        return Objective(net, weighting, pipeline.space, self.learned(), self.draw_observed)

    def learned(self) -> list[str]:
        """The processes that have a head and a loss."""
        losses = build_losses(self.config, self.pipeline.space, self.pipeline.names)
        return [k for k in self.pipeline.net.outputs if losses[k].scale > 0]

    def draw_observed(self, rng: Rng) -> dict[str, Tensor]:
        """{process: bool of its shape}: elements that are clean conditions of a batch."""
        observed = {}
        for m, modality in self.pipeline.modalities.items():
            prefix = "" if len(self.pipeline.names) == 1 else f"{m} "
            own = modality.draw_observed(self.codecs[m], rng, prefix)
            observed |= {self.pipeline.names[m][part]: mask for part, mask in own.items()}
        return observed

    def in_bf16(self) -> bool:
        """Whether the network's matrix products are computed in bfloat16; train.precision=auto: wide ones on a GPU."""
        setting, narrow = self.config.train.precision, self.pipeline.net.narrow
        return setting in ("bf16", "fp8") or (setting == "auto" and self.device.type == "cuda" and not narrow)

    def flops(self) -> float:
        """FLOPs of the whole run; a backward pass takes two forward ones."""
        return 3.0 * sample_flops(self.pipeline) * self.config.train.batch * self.config.train.steps

    def run(self, stop: int | None = None) -> Pipeline:
        """Train up to step `stop` (default: the configured number) and return the pipeline with its EMA weights.

        Raises:
            NonFiniteLoss: a loss was not finite; checkpoints hold the state before.
            CheckpointError: the disk refused a checkpoint.
            Interrupted: Ctrl-C or SIGTERM; the step was finished and saved before, except with a second Ctrl-C.
        """
        settings, state, stop = self.config.train, self.state, self.config.train.steps if stop is None else stop
        log = MetricLog(self.out, self.config, state.step, stop, self.quiet) if distributed.is_main() else NullLog()
        vote = distributed.Vote()
        with stop_request() as request, log:
            began, since = time.perf_counter(), state.step
            while state.step < stop:
                losses = self._timed_update()
                if self._due(settings.log_every, stop):
                    rate = (state.step - since) * settings.batch / (time.perf_counter() - began)
                    log.write(state.step, self._metrics(losses, rate))
                    began, since = time.perf_counter(), state.step
                log.advance()
                if self.on_evaluate and self._due(settings.eval_every, stop):
                    log.write(state.step, self._on_main(self.on_evaluate, request) or {})
                if self.on_sample and self._due(settings.sample_every, stop):
                    self._on_main(self.on_sample, request)
                number = vote(request.number)
                if number or self._due(settings.save_every, stop):
                    self.save()
                if number:
                    break
            else:
                number = max(vote(request.number), vote.close())
        if number:
            distributed.stop()
            raise Interrupted.at_step(state.step, number)
        return self.ema_pipeline()

    def update(self) -> dict[str, Tensor]:
        """One optimizer step, as a CUDA graph where possible; see `training_step`."""
        with deterministic(self.device):
            if self._step is None:
                self._step = graph_step(self.state) or (lambda: training_step(self.state))
            return self._step()

    def save(self) -> Path:
        """Write a checkpoint of the current step; see `model.storage`. Every rank must call this."""
        files = self.files()
        shards = (lambda folder: sharded.save(folder, state_tensors(self.state))) if self.sharded else None
        return save_checkpoint(self.out, self.state.step, files, self.config.train.keep_last, shards)

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint, {relative name: content}; empty except on the main rank. All ranks call this."""
        self._check_finite({})
        files = checkpoint_files(self.state, self.sharded, self.seconds)
        return files and {**files, **self.pipeline.files(), "config.yaml": dump_config(self.config).encode()}

    def ema_pipeline(self) -> Pipeline:
        """The pipeline with the EMA weights, for sampling; with sharded weights every rank must call this."""
        if self.sharded and self._gathered is None:
            net = self.build().net.to(self.device).eval().requires_grad_(False)
            net.load_state_dict(whole_tensors(self.state.ema))
            return dataclasses.replace(self.pipeline, net=net)
        return dataclasses.replace(self.pipeline, net=self._gathered or self.state.ema)

    def check_same_run(self, folder: Path) -> None:
        """CheckpointError unless the checkpoint is of this config and data; some settings may differ."""
        saved = load_config(folder / "config.yaml").model_dump(mode="json")
        for key, value in self.config.model_dump(mode="json").items():
            if key not in ("train", "sample", "compile") and value != saved[key]:
                raise CheckpointError(
                    f"{self.out} holds a run with another {key!r}: choose another --out, or delete it to start anew"
                )
        own = self.pipeline.files()
        for m, codec in build_codecs(self.config, folder).items():
            if codec.is_fitted and any(own.get(f"{m}.{name}") != content for name, content in codec.files().items()):
                raise CheckpointError(f"{self.out} holds a run on other data (its {m} differs): choose another --out")

    def _load(self, data: tuple | None) -> tuple[TrainingData, Examples]:
        """Training and held-out data, encoded."""
        if data is None:
            train, test = load_data(self.config, self.codecs, self.out / "bad_samples.jsonl")
        elif isinstance(data[0], Dataset):
            train, test = encode_split(data[0], data[1], self.config, self.codecs, "the data")
        else:
            train, test = data
        return (train.to(self.device) if isinstance(train, Examples) else train), test

    def _times(self) -> TimeSampler:
        """The training times of the config, by process."""
        times, pipeline = self.config.times, self.pipeline
        names = {m: list(parts.values()) for m, parts in pipeline.names.items()}
        subsets = {
            "+".join(k for m in subset.split("+") for k in names[m]): p for subset, p in times.condition_prob.items()
        }
        groups = tuple(tuple(parts) for parts in names.values())
        skew = pipeline.of_processes(times.time_skew)
        return TimeSampler(times.draw, times.low_discrepancy, skew, subsets, times.subset_prob, groups)

    def _timed_update(self) -> dict[str, Tensor]:
        began = time.perf_counter()
        losses = self.update()
        self.state.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        self.seconds_here += spent
        return losses

    def _metrics(self, losses: dict[str, Tensor], rate: float) -> dict[str, float]:
        """The logged numbers of a step, losses summed over the ranks."""
        mean = distributed.sum_over_ranks(torch.stack(list(losses.values()))).tolist()
        values = {f"loss/{m}": value for m, value in zip(losses, mean, strict=True)}
        self._check_finite(values)
        lr = learning_rate(self.config.train, self.state.step - 1)
        return {**values, "lr": lr, "grad_norm": float(self.state.grad_norm), "samples_per_second": rate}

    def _own_rows(self) -> range:
        """The rows of every batch that this rank computes."""
        settings, ranks = self.config.train, distributed.world()
        if settings.batch % (ranks * settings.gradient_accumulation_steps):
            parts = f"train.gradient_accumulation_steps = {settings.gradient_accumulation_steps}"
            parts += f" times {ranks} ranks" if ranks > 1 else ""
            raise ValueError(f"{parts} does not divide train.batch = {settings.batch}")
        return distributed.share(settings.batch)

    def _init_weights(self, net: nn.Module, ema: nn.Module) -> str:
        """Weights to begin with, where the folder holds no checkpoint yet; returns what was done, in a line."""
        init, done = self.config.init, "fresh weights"
        if init is not None and latest(self.out) is None:
            done = init_from(net, init.checkpoint, init.weights)
        ema.load_state_dict(net.state_dict())
        return done

    def _prepare(self, net: nn.Module, as_graph: bool) -> bool:
        """Freeze parts, convert to fp8 and compile, as configured; before the weights are sharded.

        Returns whether the run is compiled. A step that will be one graph is compiled as a whole later, not here.
        """
        config, settings = self.config, self.config.train
        for name in settings.freeze:
            for k in self.pipeline.names[name].values() if name in self.pipeline.names else [name]:
                for module in net.part(k):
                    module.requires_grad_(False)
        net.activation_checkpointing = settings.activation_checkpointing
        compiles = should_compile(config.compile, self.device, self.flops)
        if settings.precision == "fp8":
            float8.convert(net, self.device)
        if not compiles or not has_compiler(self.device, config.compile == "always"):
            return False
        if not as_graph:
            compile_net(net, self.device, sharded=self.sharded)
        return True

    def _distribute(self, module: Objective, ema: nn.Module) -> nn.Module:
        """The objective as it is, or wrapped for several ranks."""
        if distributed.world() == 1:
            return module
        if self.sharded:
            sharded.shard(module, self.in_bf16())
            sharded.shard(ema, bf16=False)
            return module
        device = [self.device] if self.device.type == "cuda" else None
        idle = set(self.learned()) != set(self.pipeline.space)  # a stream without an output leaves weights unused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers
            return DistributedDataParallel(
                module, device, broadcast_buffers=False, find_unused_parameters=idle, gradient_as_bucket_view=True
            )

    def _on_main(self, hook: Hook, request: StopRequest) -> dict[str, float] | None:
        """Call a hook on the main rank, with whole weights, while the others wait; a signal cuts it short."""
        self._gathered = self.ema_pipeline().net if self.sharded else None
        values = request.call(lambda: hook(self)) if distributed.is_main() else None
        release(self._gathered or self.state.ema)
        self._gathered = None
        distributed.barrier()
        return values

    def _due(self, every: int | None, stop: int) -> bool:
        return every is not None and (self.state.step % every == 0 or self.state.step == stop)

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = distributed.sum_over_ranks((~self.state.finite).float())
        zeroed = self.config.train.on_nonfinite_grad == "zero"
        if not bad and (zeroed or all(math.isfinite(v) for v in values.values())):
            return
        last = latest(self.out)
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise NonFiniteLoss(
            f"the loss is not finite at or before step {self.state.step}; {where}; try a lower train.lr"
        )
