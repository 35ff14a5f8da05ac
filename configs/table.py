"""Every setting of a table model, typed and documented; read by `schema.load(…, model=TableConfig)`."""

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
    """How columns become tokens and numbers (see `model.table_codec`)."""

    max_discrete_values: int = Field(128, ge=0, description="numerical columns with at most so many values are tokens; 0 is none")
    spike_share: float = Field(0.05, gt=0, description="share of rows from which one value is split off; above 1 is none")
    max_categories: int = Field(256, ge=2, description="states of a categorical column; rarer categories are pooled")
    n_quantiles: int = Field(2000, ge=2, description="points of a quantile curve")
    tail_rows: float = Field(
        2.0, ge=2, description="rows that get a number's smallest value, and largest, if sampled as many as in training"
    )


class NumericalConfig(Section):
    """Numerical columns: Gaussian diffusion of normal scores."""

    schedule: Schedule = Schedule()
    t_min: float = Field(1e-3, gt=0, lt=1)
    time_conditioning: Literal["sigma", "time", "log_snr"] = "time"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    loss: Loss = Field(Loss(), description="scale is per column: a group's loss is the sum over its columns")
    sampler: SamplerConfig = SamplerConfig()


class CategoricalConfig(Section):
    """Categorical columns: masked diffusion."""

    delta: float = Field(1e-3, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1)
    loss_on: Literal["all", "masked"] = Field("all", description="positions in the loss")
    mask_logit: Literal["kept"] | None = Field(
        None, description="kept: the head has a logit for the mask, whose share lowers the reverse rate (official)"
    )
    loss: Loss = Field(Loss(), description="scale is per column")
    sampler: SamplerConfig = SamplerConfig()


class TableNetwork(Section):
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp: int = Field(4, gt=0, description="factor of the feed-forward width")
    deep_heads: bool = Field(True, description="three layers per categorical column (official) instead of one")
    time_conditioning: list[Literal["num", "cat"]] = Field(
        ["num"], min_length=1, description="groups whose times the network sees; those the table lacks are dropped"
    )
    time_scale: float = Field(1.0, gt=0, description="factor on times before their sinusoids; official 1")
    sinusoids: int = Field(0, ge=0, description="of a number, learned per column; 0: an MLP of its value (official)")


class TableSampling(Sampling):
    batch_size: int | None = Field(
        None, gt=0, description="rows per batch; null: 4,096, on a GPU up to 65,536, fewer for tables of many states"
    )


class TableConfig(Section):
    name: str
    seed: int = 0
    compile: Compile = COMPILE
    missing: list[str] = Field([""], min_length=1, description="texts that mean an empty cell of a CSV")
    encoding: EncodingConfig = EncodingConfig()
    numerical: NumericalConfig = NumericalConfig()
    categorical: CategoricalConfig = CategoricalConfig()
    network: TableNetwork
    times: TimesConfig = TimesConfig()
    conditioning_prob: float = Field(0.0, ge=0, le=1, description="share of rows in which random columns are given, for conditions")
    noise: Literal["iid", "sobol"] = Field(
        "iid", description="sobol: noise and tokens of the rows of a seed are spread evenly, which varies less"
    )
    init: Init | None = Field(None, description="null: fresh weights")
    train: Train
    sample: TableSampling = TableSampling()

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
