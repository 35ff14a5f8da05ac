"""Our table recipes for the quality benchmark: a shipped config fitted in a run folder of its own, then sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..train.synthesizer import TableSynthesizer
from .table_quality import Synthesize


def recipes(runs: Path, one_fit: bool = False, device: str | None = None, overrides: Sequence[str] = ()) -> Synthesize:
    """What `table_quality.quality` calls: recipe "default" is configs/table/default.yaml, fitted under `runs`.

    Every seed is a fit of its own, or with `one_fit` a sampling of the fit of seed 0 (as the paper's 20 samplings).
    A finished or interrupted fit is taken up where it was.
    """

    def synthesize(train: pd.DataFrame, schema: dict, recipe: str, seed: int, n: int) -> tuple[pd.DataFrame, int, int]:
        fitted = 0 if one_fit else seed
        model = TableSynthesizer(
            f"table/{recipe}",
            overrides=overrides,
            seed=fitted,
            device=device,
            out=runs / f"{schema['name']}-{recipe}-{fitted}",
            verbose=True,
        ).fit(train)
        system = model.system_
        parameters = sum(p.numel() for p in system.net.parameters())
        return model.sample(n, seed=seed), parameters, system.config.sample.steps

    return synthesize
