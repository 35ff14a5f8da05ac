"""Every setting of a run, typed and documented; unknown keys are refused.

A config is a YAML file of these models plus `key=value` overrides, read by `configs.load`. The resolved config is
written beside every checkpoint and builds the same space, network and codecs again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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

    width: int = Field(gt=0, description="features of a position")
    cond: int | None = Field(None, gt=0, description="width of the time conditioning; default the stream's width")
    single_stream_depth: int = Field(0, ge=0, description="blocks of its own after the joint trunk")
    output: bool = Field(True, description="false: a pure condition, never predicted")
    patch: int = Field(2, gt=0, description="side of a patch, images only")


class Latents(Section):
    """Images are diffused in the latent space of a variational autoencoder (`diffusers.AutoencoderKL`)."""

    vae: str = Field("stabilityai/sd-vae-ft-mse", description="local folder or Hugging Face id")
    scale: float = Field(0.18215, gt=0, description="factor that brings latents to about unit variance")


class Image(Section):
    """An image under Gaussian diffusion: pixel values scaled to [−1, 1], or latents."""

    process: Literal["gaussian"] = Field(description="gaussian")
    channels: int = Field(gt=0, description="of what is diffused: 4 for the usual latents")
    size: int = Field(gt=0, description="side of what is diffused: 32 for latents of images of 256 pixels")
    pixel_max: float = Field(255.0, gt=0, description="raw pixels lie in [0, pixel_max]")
    latents: Latents | None = Field(None, description="null: pixels")
    schedule: Schedule = Field(Schedule(), description="the noise schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    time_conditioning: Literal["sigma", "time", "log_snr"] = Field(
        "sigma", description="the network's input for the time"
    )
    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="what the network predicts (see `diffusion.Gaussian`)"
    )
    loss: Loss = Field(Loss(), description="the loss")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")
    stream: StreamConfig = Field(description="part of the network")


class Tokenizer(Section):
    """A vocabulary in the format of the `tokenizers` library."""

    kind: Literal["bpe", "clip"] = Field(description="byte-level BPE, or CLIP's")
    path: str = Field(description="tokenizer.json, a folder that holds it, or a Hugging Face id")
    states: int = Field(gt=1, description="real states: every id the tokenizer gives, the pad included")
    pad: int = Field(ge=0, description="id that fills a caption up to its length; official CLIP: 49407")
    start: int | None = Field(None, ge=0, description="id put before every caption; official CLIP: 49406")
    end: int | None = Field(None, ge=0, description="id put after every caption; official CLIP: 49407")

    @model_validator(mode="after")
    def _inside(self):
        for name in ("pad", "start", "end"):
            if (value := getattr(self, name)) is not None and value >= self.states:
                raise ValueError(f"{name} = {value} lies outside the {self.states} states")
        return self


class Text(Section):
    """A caption under masked or uniform diffusion: characters (state 0 is the pad, then the alphabet) or tokens."""

    process: Literal["masked", "uniform"] = Field(description="masked or uniform diffusion")
    alphabet: str | None = Field(
        None, min_length=1, description="the characters, in the order of their token ids 1, 2, …"
    )
    tokenizer: Tokenizer | None = Field(None, description="instead of an alphabet")
    length: int = Field(gt=0, description="tokens of a caption, pads included")
    mask_logit: Literal["ignored"] | None = Field(
        None, description="ignored: the head has a logit for the mask, which sampling leaves out (official)"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    loss_on: Literal["all", "masked"] = Field("all", description="positions in the loss (masked process)")
    attend_pads: bool = Field(True, description="false: attention skips keys whose current token is the pad")
    loss: Loss = Field(Loss(), description="the loss")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")
    stream: StreamConfig = Field(description="part of the network")

    @property
    def states(self) -> int:
        """Real states K, the pad included."""
        return self.tokenizer.states if self.tokenizer else len(self.alphabet or "") + 1

    @property
    def pad(self) -> int:
        """The token that fills a caption up to its length."""
        return self.tokenizer.pad if self.tokenizer else 0

    @model_validator(mode="after")
    def _one_vocabulary(self):
        if (self.alphabet is None) == (self.tokenizer is None):
            raise ValueError("a text needs an alphabet or a tokenizer, one of the two")
        if self.alphabet and len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError("alphabet repeats a character")
        if self.mask_logit and self.process == "uniform":
            raise ValueError("mask_logit is for the masked process")
        return self


Modality = Annotated[Image | Text, Field(discriminator="process")]


class Network(Section):
    """The MMDiT (see `model.mmdit`)."""

    depth: int = Field(gt=0, description="joint blocks")
    heads: int = Field(gt=0, description="of the attention")
    head_dim: int = Field(gt=0, description="features of an attention head")
    time_scale: float = Field(1.0, gt=0, description="factor on the time before its sinusoids; official 1")


class TimesConfig(Section):
    """Training times (see `diffusion.training_times`)."""

    draw: Literal["decoupled", "unified"] = Field("decoupled", description="a time per modality, or one for all")
    low_discrepancy: bool = Field(True, description="spread the times of a batch evenly")
    time_skew: dict[str, float] = Field(
        {}, description="s >= 1 per modality: t = 1 - (1 - u)^s has more noisy times than t = u"
    )
    condition_prob: dict[str, float] = Field(
        {}, description="share of samples in which a modality is a clean condition; {text: 1} is the official stage 1"
    )


class Data(Section):
    """The data set."""

    name: Literal["digits", "npz", "packed"] = Field(
        description="digits: scikit-learn's; npz: arrays images, captions[, split]; packed: made by anystate data pack"
    )
    path: str | None = Field(
        None, description="the .npz file or packed folder; relative paths are also looked up in $ANYSTATE_DATA"
    )
    test_share: float = Field(0.2, gt=0, lt=1, description="held-out share where the data has no split of its own")
    split_seed: int = Field(0, description="seed of that split")
    held_out: int = Field(5000, gt=0, description="packed: at most so many held-out pairs are kept in memory")
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
    batch_size: int | None = Field(128, gt=0, description="samples per batch")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network; auto: bf16 autocast on a GPU unless train.precision=fp32, else fp32"
    )


Compile = Literal["auto", "always", "never"]
COMPILE: Any = Field("auto", description="torch.compile; auto: where a run takes a few times as long as the compiler")


class Config(Section):
    """A run on images and text."""

    name: str = Field(description="of the run; default folder runs/NAME")
    seed: int = Field(0, description="of weights, data order, training and samples")
    compile: Compile = COMPILE
    data: Data = Field(description="the data set")
    modalities: dict[str, Modality] = Field(min_length=1, description="{name: modality}")
    network: Network = Field(description="the network")
    times: TimesConfig = Field(TimesConfig(), description="training times")
    init: Init | None = Field(None, description="null: fresh weights")
    train: Train = Field(description="training")
    sample: Sampling = Field(Sampling(), description="sampling")

    @model_validator(mode="after")
    def _freeze_known(self):
        if unknown := sorted(set(self.train.freeze) - {"joint", *self.modalities}):
            raise ValueError(f"train.freeze names {unknown[0]!r}; allowed: joint, {', '.join(self.modalities)}")
        return self
