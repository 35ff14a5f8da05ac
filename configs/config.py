"""Every setting of a run, typed and documented; unknown keys are refused.

A config is a YAML file of these models plus `key=value` overrides, read by `configs.load`. The resolved config is
written beside every checkpoint and builds the same space, network and codecs again. The sections of modalities are
kinds, one a file in `model/modalities/`, or the user's own (see `configs.kinds`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, SerializeAsAny, Tag, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Section):
    """A Gaussian noise schedule and its parameters (see `diffusion.schedules`)."""

    name: Literal["scaled_linear", "linear", "linear_half", "cosine"] = Field(
        "cosine", description="see `diffusion.schedules`"
    )
    options: dict[str, float] = Field({}, description="parameters of the schedule, e.g. {beta_max: 20}")


class SamplerConfig(Section):
    """The sampler of a modality (see `sample.steppers`)."""

    method: str | None = Field(None, description="rule of a step; null is the process's default")
    time_grid: Literal["linear", "rho", "logsnr"] = Field("linear", description="times between the steps")


class Loss(Section):
    """The loss of a modality: λ · w(t) · loss (see `diffusion.weighting`)."""

    scale: float = Field(1.0, ge=0, description="λ: factor on this modality's loss")
    weighting: Literal["none", "elbo", "balanced", "min_snr", "learned"] = Field("none", description="w(t)")
    gamma: float = Field(5.0, gt=0, description="γ of min_snr")


class StreamConfig(Section):
    """The stream of a modality in the network."""

    width: int | None = Field(None, gt=0, description="features of a position; required unless `share` is set")
    cond: int | None = Field(None, gt=0, description="width of the time conditioning; default the stream's width")
    single_stream_depth: int = Field(0, ge=0, description="blocks of its own after the joint trunk")
    output: bool = Field(True, description="false: a pure condition, never predicted")
    patch: int | None = Field(
        None, gt=0, description="image: side of a patch; series: frames of a token; vector: features of a token"
    )
    share: str | None = Field(None, description="name of the modality whose stream this one joins")
    aligned: bool = Field(
        False, description="with share: its positions are added to those of that modality, instead of following them"
    )

    @model_validator(mode="after")
    def _width_or_share(self):
        if (self.width is None) == (self.share is None):
            raise ValueError("a stream has a width of its own, or shares that of another modality: set one of the two")
        return self


class MMDiTConfig(Section):
    """The MMDiT, for any modalities (see `model.mmdit`)."""

    kind: Literal["mmdit"] = Field("mmdit", description="which network")
    depth: int = Field(gt=0, description="joint blocks")
    heads: int = Field(gt=0, description="of the attention")
    head_dim: int = Field(gt=0, description="features of an attention head")
    time_scale: float = Field(1.0, gt=0, description="factor on the time before its sinusoids; official 1")
    qk_norm: bool = Field(True, description="RMS norm of queries and keys; some official checkpoints have none")


class TableDiTConfig(Section):
    """The TableDiT, for one modality of table columns (see `model.table_dit`)."""

    kind: Literal["table_dit"] = Field("table_dit", description="which network")
    width: int = Field(gt=0, description="features of a cell")
    depth: int = Field(gt=0, description="blocks")
    heads: int = Field(gt=0, description="of the attention")
    mlp: int = Field(4, gt=0, description="factor of the feed-forward width")
    deep_heads: bool = Field(True, description="three layers per categorical column (official) instead of one")
    time_conditioning: list[Literal["num", "cat"]] = Field(
        ["num"],
        min_length=1,
        description="groups of columns whose times condition the network, as far as the table has them",
    )
    time_scale: float = Field(1.0, gt=0, description="factor on times before their sinusoids; official 1")
    sinusoids: int = Field(
        0, ge=0, description="learned sinusoids of a number per column; 0: an MLP of its value (official)"
    )


def _network_kind(value: Any) -> str:
    return value.get("kind", "mmdit") if isinstance(value, dict) else getattr(value, "kind", "")


Network = Annotated[
    Annotated[MMDiTConfig, Tag("mmdit")] | Annotated[TableDiTConfig, Tag("table_dit")], Discriminator(_network_kind)
]


class TimesConfig(Section):
    """Training times (see `diffusion.training_times`)."""

    draw: Literal["decoupled", "unified"] = Field("decoupled", description="a time per modality, or one for all")
    low_discrepancy: bool = Field(True, description="spread the times of a batch evenly")
    time_skew: dict[str, float] = Field(
        {}, description="s >= 1 per modality: t = 1 - (1 - u)^s has more noisy times than t = u"
    )
    condition_prob: dict[str, float] = Field(
        {},
        description="share of samples in which a modality, or all of several (image+text), is a clean condition; "
        "{text: 1} is the official stage 1",
    )
    subset_prob: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of samples in which a random part of the modalities, each with probability 1/2, is a clean "
        "condition; at least one is not",
    )


class Data(Section):
    """The data set."""

    source: str = Field(
        description="digits or adult, which come with the package; emoji (emoji/emoji.npz); an .npz, CSV, Parquet or "
        "JSON file; a folder of files; a folder made by anystate data pack; a Hugging Face data set; or "
        "package.module:function, which returns data sets. Relative paths are also looked up in $ANYSTATE_DATA"
    )
    fields: dict[str, str] = Field(
        {}, description="array or column of the source per modality, where it is not the modality's name"
    )
    options: dict[str, Any] = Field(
        {}, description="keyword arguments of a function, or of the download of a Hugging Face data set"
    )
    test_share: float = Field(0.2, gt=0, lt=1, description="held-out share where the data has no split of its own")
    split_seed: int = Field(0, description="seed of that split")
    held_out: int = Field(5000, gt=0, description="packed: at most so many held-out examples are kept in memory")
    loader: Literal["auto", "dali", "webdataset"] = Field("auto", description="packed: auto is DALI where installed")
    flip: bool = Field(False, description="packed: half of the images mirrored")
    bad_share: float = Field(0.01, ge=0, le=1, description="packed: a larger share of unreadable samples stops the run")


class Init(Section):
    """Weights to start from, say the stage before; the optimizer starts fresh."""

    checkpoint: str = Field(description="a run folder (its newest checkpoint) or a checkpoint folder")
    weights: Literal["ema", "raw"] = Field("ema", description="EMA or raw weights")


class Train(Section):
    """Training."""

    steps: int = Field(gt=0, description="optimizer steps")
    batch: int = Field(gt=0, description="samples per optimizer step, over all accumulation steps and ranks")
    gradient_accumulation_steps: int = Field(1, gt=0, description="the batch is computed in this many parts")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after the warm-up"
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient norm limit; null is none")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the EMA weights")
    precision: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        "auto",
        description="auto: fp32; text and images on a GPU bf16 autocast; fp8: bf16, large layers in fp8 (model.float8)",
    )
    freeze: list[str] = Field(
        [], description="joint: embedders, time embedders and trunk; a modality's name: everything of its own"
    )
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="under torchrun: whole copies, or sharded weights")
    activation_checkpointing: bool = Field(False, description="blocks are run again in the backward pass")
    on_nonfinite_grad: Literal["stop", "zero"] = Field(
        "stop", description="stop with an error, or set such entries of the gradient to 0"
    )
    log_every: int = Field(50, gt=0, description="steps between logged metrics")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_last: int = Field(2, gt=0, description="checkpoints kept")
    sample_every: int | None = Field(None, gt=0, description="steps between galleries; null is never")
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations; null is never")
    tensorboard: bool = Field(False, description="also log to TensorBoard")
    wandb: str | None = Field(None, description="project of Weights & Biases; null is off")


class GuidanceConfig(Section):
    """Noisy guidance (see `diffusion.guidance`)."""

    scale: float | dict[str, float] = Field(1.0, description="w for all, or per modality; 1 is no guidance")
    final_time: float = Field(1.0, gt=0, le=1, description="σ, noise time of the condition in the second branch")
    interval: tuple[float, float] = Field((0.0, 1.0), description="times between which guidance acts")

    @model_validator(mode="after")
    def _ordered(self):
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"interval needs 0 <= start <= end <= 1, got [{low}, {high}]")
        return self


class Sampling(Section):
    """Defaults of sampling."""

    steps: int = Field(50, gt=0, description="updates of every generated modality")
    guidance: GuidanceConfig = Field(GuidanceConfig(), description="guidance by conditions")
    joint_guidance: GuidanceConfig | None = Field(None, description="guidance in joint sampling; default the same")
    batch_size: int | None = Field(
        128, gt=0, description="samples per batch; null, for tables: 4,096, on a GPU up to 65,536"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network; auto: bf16 autocast on a GPU unless train.precision=fp32, else fp32"
    )


Compile = Literal["auto", "always", "never"]
COMPILE: Any = Field("auto", description="torch.compile; auto: where a run takes a few times as long as the compiler")


NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # of a modality: names files and modules of the network


class Config(Section):
    """A run."""

    name: str = Field(description="of the run; default folder runs/NAME")
    seed: int = Field(0, description="of weights, data order, training and samples")
    compile: Compile = COMPILE
    data: Data | None = Field(None, description="the data set; null where the program brings its own, as for tables")
    modalities: dict[str, SerializeAsAny[Section]] = Field(min_length=1, description="{name: modality}")
    network: Network = Field(description="the network")
    times: TimesConfig = Field(TimesConfig(), description="training times")
    init: Init | None = Field(None, description="null: fresh weights")
    train: Train = Field(description="training")
    sample: Sampling = Field(Sampling(), description="sampling")

    @model_validator(mode="after")
    def _known_names(self):
        names = ", ".join(self.modalities)
        for m in self.modalities:
            if not NAME.fullmatch(m) or m == "joint":
                raise ValueError(f"modality {m!r}: a name has letters, digits and _, and is not joint")
        if unknown := sorted(set(self.train.freeze) - {"joint", *self.modalities}):
            raise ValueError(f"train.freeze names {unknown[0]!r}; allowed: joint, {names}")
        for key, given in (("condition_prob", self.times.condition_prob), ("time_skew", self.times.time_skew)):
            for m in [part for subset in given for part in subset.split("+")]:
                if m not in self.modalities:
                    raise ValueError(f"times.{key} names unknown modality {m!r}; there are {names}")
        for subset in self.times.condition_prob:
            if len(self.modalities) > 1 and set(subset.split("+")) == set(self.modalities):
                raise ValueError(f"times.condition_prob: {subset} is everything, which leaves nothing to learn")
        if self.data and (unknown := sorted(set(self.data.fields) - set(self.modalities))):
            raise ValueError(f"data.fields names unknown modality {unknown[0]!r}; there are {names}")
        return self

    @model_validator(mode="after")
    def _fits_the_network(self):
        if isinstance(self.network, MMDiTConfig):
            return self
        if self.train.freeze or self.train.activation_checkpointing:
            raise ValueError("train.freeze and train.activation_checkpointing are for network.kind: mmdit")
        if self.train.precision == "fp8" or self.sample.precision == "bf16":
            raise ValueError(
                "train.precision=fp8 and sample.precision=bf16 are for network.kind: mmdit, whose layers are wide"
            )
        if len(self.modalities) > 1:
            raise ValueError("network.kind: table_dit takes one modality of table columns; mmdit takes any mix")
        return self
