"""Every setting of a table model, typed and documented; read by `load_config(…, model=TableConfig)`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config import (
    COMPILE,
    Compile,
    Init,
    Loss,
    SamplerConfig,
    Sampling,
    Schedule,
    Section,
    TimesConfig,
    Train,
)


class EncodingConfig(Section):
    """Encoding of columns as tokens and z-scores (see `model.codecs.table`)."""

    max_discrete_values: int = Field(
        128, ge=0, description="numerical columns with at most so many values are tokens; 0: none is"
    )
    spike_share: float = Field(
        0.05, gt=0, description="a value that holds this share of the rows gets a token of its own; above 1: none does"
    )
    max_categories: int = Field(256, ge=2, description="states of a categorical column; rarer categories are pooled")
    n_quantiles: int = Field(2000, ge=2, description="points of a quantile curve")
    tail_rows: float = Field(
        2.0, ge=2, description="rows that get a number's smallest value, and largest, if sampled as many as in training"
    )


class NumericalConfig(Section):
    """Numerical columns: Gaussian diffusion of z-scores."""

    schedule: Schedule = Field(Schedule(), description="the noise schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    time_conditioning: Literal["sigma", "time", "log_snr"] = Field(
        "time", description="the network's input for the time"
    )
    prediction_type: Literal["epsilon", "v_prediction"] = Field("epsilon", description="what the network predicts")
    loss: Loss = Field(Loss(), description="scale is per column: a group's loss is the sum over its columns")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")


class CategoricalConfig(Section):
    """Categorical columns: masked diffusion."""

    delta: float = Field(1e-3, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1, description="smallest time; 0 is clean data")
    loss_on: Literal["all", "masked"] = Field("all", description="positions in the loss")
    mask_logit: Literal["kept"] | None = Field(
        None, description="kept: the head has a logit for the mask, whose share lowers the reverse rate (official)"
    )
    loss: Loss = Field(Loss(), description="scale is per column")
    sampler: SamplerConfig = Field(SamplerConfig(), description="the sampler")


class TableNetwork(Section):
    """The TableDiT (see `model.table_dit`)."""

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


class TableSampling(Sampling):
    """Defaults of sampling a table."""

    batch_size: int | None = Field(
        None, gt=0, description="rows per batch; null: 4,096, on a GPU up to 65,536, fewer for tables of many states"
    )


class TableConfig(Section):
    """A run on a table."""

    name: str = Field(description="of the run")
    seed: int = Field(0, description="of weights, data order, training and samples")
    compile: Compile = COMPILE
    missing: list[str] = Field([""], min_length=1, description="strings that mean a missing cell in a CSV")
    encoding: EncodingConfig = Field(EncodingConfig(), description="of the columns")
    numerical: NumericalConfig = Field(NumericalConfig(), description="numerical columns")
    categorical: CategoricalConfig = Field(CategoricalConfig(), description="categorical columns")
    network: TableNetwork = Field(description="the network")
    times: TimesConfig = Field(TimesConfig(), description="training times")
    conditioning_prob: float = Field(
        0.0, ge=0, le=1, description="share of training rows in which random columns are conditions"
    )
    noise: Literal["iid", "sobol"] = Field(
        "iid", description="sobol: random numbers spread evenly over the rows, for statistics of lower variance"
    )
    init: Init | None = Field(None, description="null: fresh weights")
    train: Train = Field(description="training")
    sample: TableSampling = Field(TableSampling(), description="sampling")

    @model_validator(mode="after")
    def _no_parts(self):
        if self.train.freeze or self.train.activation_checkpointing:
            raise ValueError("train.freeze and train.activation_checkpointing are for text and images, not for tables")
        if self.train.precision == "fp8":
            raise ValueError("train.precision=fp8 is for text and images: a table's layers are too narrow to gain")
        if self.sample.precision == "bf16":
            raise ValueError("sample.precision=bf16 is for text and images: tables are drawn in fp32")
        if self.noise == "sobol" and self.categorical.sampler.method != "first_hitting":
            raise ValueError("noise: sobol needs categorical.sampler.method: first_hitting; or set noise: iid")
        return self
