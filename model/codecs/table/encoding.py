"""Settings of the encoding of table columns."""

from __future__ import annotations

from pydantic import Field

from ....configs.config import Section


class EncodingConfig(Section):
    """Encoding of columns as tokens and z-scores (see `model.codecs.table`)."""

    max_discrete_values: int = Field(
        128, ge=0, description="numerical columns with at most so many values are tokens; 0: none is"
    )
    spike_share: float = Field(
        0.05, gt=0, description="a value that holds this share of the rows gets a token of its own; above 1: none does"
    )
    max_categories: int = Field(
        10_000, ge=2, description="states of a categorical column; rarer categories are pooled, which fit says"
    )
    n_quantiles: int = Field(2000, ge=2, description="points of a quantile curve")
    tail_rows: float = Field(
        2.0, ge=2, description="rows that get a number's smallest value, and largest, if sampled as many as in training"
    )
