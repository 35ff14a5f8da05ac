"""Every setting of a table model, typed and documented; read by `schema.load(…, model=TableConfig)`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .config import (
    COMPILE,
    ENGINE,
    Compile,
    Engine,
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

    discrete: int = Field(128, ge=0, description="numerical columns with at most so many values are tokens; 0 is none")
    spike: float = Field(0.05, gt=0, description="share of rows from which one value is split off; above 1 is none")
    most: int = Field(256, ge=2, description="states of a categorical column; rarer categories are pooled")
    knots: int = Field(2000, ge=2, description="points of a quantile curve")
    ends: float = Field(
        2.0, ge=2, description="rows that get a number's smallest value, and largest, if sampled as many as in training"
    )


class NumbersConfig(Section):
    """Numerical columns: Gaussian diffusion of normal scores."""

    schedule: Schedule = Schedule()
    t_min: float = Field(1e-3, gt=0, lt=1)
    time_input: Literal["sigma", "time", "log_snr"] = "time"
    predicts: Literal["eps", "v"] = "eps"
    loss: Loss = Field(Loss(), description="scale is per column: a group's loss is the sum over its columns")
    sampler: SamplerConfig = SamplerConfig()


class TokensConfig(Section):
    """Categorical columns: masked diffusion."""

    delta: float = Field(1e-3, gt=0, lt=1, description="δ of the log-linear schedule")
    t_min: float = Field(1e-3, gt=0, lt=1)
    counted: Literal["all", "masked", "balanced"] = Field(
        "all", description="positions in the loss; balanced: the ELBO with less variance, goes with loss.weighting none"
    )
    mask_column: Literal["leak"] | None = Field(None, description="leak: official heads, which put out the mask too")
    loss: Loss = Field(Loss(), description="scale is per column")
    sampler: SamplerConfig = SamplerConfig()


class TableNetwork(Section):
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp: int = Field(4, gt=0, description="factor of the feed-forward width")
    deep_heads: bool = Field(True, description="three layers per categorical column (official) instead of one")
    clocks: list[Literal["num", "cat"]] = Field(
        ["num"], min_length=1, description="groups whose times the network sees; those the table lacks are dropped"
    )
    time_scale: float = Field(1.0, gt=0, description="factor on times before their sinusoids; official 1")
    sinusoids: int = Field(0, ge=0, description="of a number, learned per column; 0: an MLP of its value (official)")


class TableSampling(Sampling):
    chunk: int | None = Field(
        None, gt=0, description="rows per batch; null: 4,096, on a GPU up to 65,536, fewer for tables of many states"
    )


class TableConfig(Section):
    name: str
    seed: int = 0
    engine: Engine = ENGINE
    compile: Compile = COMPILE
    missing: list[str] = Field([""], min_length=1, description="texts that mean an empty cell of a CSV")
    encoding: EncodingConfig = EncodingConfig()
    numbers: NumbersConfig = NumbersConfig()
    tokens: TokensConfig = TokensConfig()
    network: TableNetwork
    times: TimesConfig = TimesConfig()
    known: float = Field(0.0, ge=0, le=1, description="share of rows in which random columns are given, for conditions")
    draws: Literal["independent", "sobol"] = Field(
        "independent", description="sobol: noise and tokens of the rows of a seed are spread evenly, which varies less"
    )
    init: Init | None = Field(None, description="null: fresh weights")
    train: Train
    sample: TableSampling = TableSampling()

    @model_validator(mode="after")
    def _no_parts(self):
        if self.train.freeze or self.train.recompute:
            raise ValueError("train.freeze and train.recompute are for text and images, not for tables")
        if self.train.precision == "fp8":
            raise ValueError("train.precision=fp8 is for text and images: a table's layers are too narrow to gain")
        if self.sample.precision == "bf16":
            raise ValueError("sample.precision=bf16 is for text and images: tables are drawn in fp32")
        if self.tokens.counted == "balanced" and self.tokens.loss.weighting != "none":
            raise ValueError("tokens.counted: balanced weighs by itself: set tokens.loss.weighting: none")
        if self.draws == "sobol" and self.tokens.sampler.kind != "first_hitting":
            raise ValueError("draws: sobol needs tokens.sampler.kind: first_hitting; or set draws: independent")
        return self
