"""The shipped table configs ("recipes") as the benchmarks use them: each is fitted in a run folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ...model.codecs.table.schema import Schema
from ...train.synthesizer import TableSynthesizer
from .quality import Synthesize
from .tasks import Fit


def fits(runs: Path, device: str | None = None, overrides: Sequence[str] = ()) -> Fit:
    """A function that fits a recipe, e.g. "default" for configs/table/default.yaml, in a folder under `runs`.

    A finished fit is reused and an interrupted one resumed.
    """

    def fit(train: pd.DataFrame, schema: Schema, recipe: str, seed: int) -> TableSynthesizer:
        return TableSynthesizer(
            f"table/{recipe}",
            overrides=overrides,
            seed=seed,
            device=device,
            out=runs / f"{schema.name}-{recipe}-{seed}",
            verbose=True,
        ).fit(train)

    return fit


def recipes(runs: Path, one_fit: bool = False, device: str | None = None, overrides: Sequence[str] = ()) -> Synthesize:
    """The function that `quality` takes.

    Every seed is a fit of its own, or with `one_fit` a sample of the fit of seed 0 (as the 20 samples of the paper).
    """
    fit = fits(runs, device, overrides)

    def synthesize(
        train: pd.DataFrame, schema: Schema, recipe: str, seed: int, n: int
    ) -> tuple[pd.DataFrame, int, int]:
        model = fit(train, schema, recipe, 0 if one_fit else seed)
        pipeline = model.pipeline_
        parameters = sum(p.numel() for p in pipeline.net.parameters())
        return model.sample(n, seed=seed), parameters, pipeline.config.sample.steps

    return synthesize
