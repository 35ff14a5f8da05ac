"""Our table recipes for the benchmarks: a shipped config fitted in a run folder of its own, then used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ...train.synthesizer import TableSynthesizer
from .quality import Synthesize
from .tasks import Fit


def fits(runs: Path, device: str | None = None, overrides: Sequence[str] = ()) -> Fit:
    """A function that fits recipe "default", which is configs/table/default.yaml, and so on, under `runs`.

    A finished or interrupted fit is taken up where it was.
    """

    def fit(train: pd.DataFrame, schema: dict, recipe: str, seed: int) -> TableSynthesizer:
        return TableSynthesizer(
            f"table/{recipe}",
            overrides=overrides,
            seed=seed,
            device=device,
            out=runs / f"{schema['name']}-{recipe}-{seed}",
            verbose=True,
        ).fit(train)

    return fit


def recipes(runs: Path, one_fit: bool = False, device: str | None = None, overrides: Sequence[str] = ()) -> Synthesize:
    """What `table_quality.quality` calls.

    Every seed is a fit of its own, or with `one_fit` a sampling of the fit of seed 0 (as the paper's 20 samplings).
    """
    fit = fits(runs, device, overrides)

    def synthesize(train: pd.DataFrame, schema: dict, recipe: str, seed: int, n: int) -> tuple[pd.DataFrame, int, int]:
        model = fit(train, schema, recipe, 0 if one_fit else seed)
        system = model.system_
        parameters = sum(p.numel() for p in system.net.parameters())
        return model.sample(n, seed=seed), parameters, system.config.sample.steps

    return synthesize
