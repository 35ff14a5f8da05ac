"""Samples that a run shows of itself while it trains."""

from __future__ import annotations

from ..sample import sample
from .generate import write_sheet
from .loop import Trainer


def save_galleries(trainer: Trainer) -> None:
    """Write joint samples and samples given each modality of held-out data to OUT/samples/."""
    system, settings = trainer.averaged(), trainer.config.sample
    known = trainer.test_data.batch(trainer.config.seed, 0, range(16), 16)
    cases = {"joint": {}, **{f"given_{m}": {m: x} for m, x in known.items() if len(known) > 1}}
    for name, given in cases.items():
        drawn = sample(
            system.net,
            system.space,
            given,
            n=16,
            steps=settings.steps,
            guidance=system.guidance(bool(given)),
            samplers=system.samplers,
        )
        write_sheet(system, drawn, trainer.out / "samples" / f"{trainer.step:08d}_{name}.png")
