"""The results of `anystate bench schedules` as tables, and which statements of the paper's summary they support."""

from __future__ import annotations

import dataclasses

import numpy as np
from rich.table import Table

VARIANTS = ("decoupled", "unified", "image_only", "text_only")
METRICS = {  # name: (heading, whether larger is better)
    "image_frechet": ("Fréchet ↓\njoint images", False),
    "text_valid": ("valid ↑\njoint captions", True),
    "agreement": ("agree ↑\njoint pairs", True),
    "text_to_image": ("text → image ↑", True),
    "image_to_text": ("image → text ↑", True),
}
CLAIMS = [  # statement, metric, variants that should be better, variants that should be worse
    ("decoupled is best on images", "image_frechet", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on images", "text_to_image", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on captions", "text_valid", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best on captions", "image_to_text", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("decoupled is best jointly", "agreement", ["decoupled"], ["unified", "image_only", "text_only"]),
    ("unified is poor on images", "image_frechet", ["decoupled", "image_only"], ["unified"]),
    ("unified is poor on images", "text_to_image", ["decoupled", "image_only"], ["unified"]),
    ("unified is poor on captions", "text_valid", ["decoupled", "text_only"], ["unified"]),
    ("unified is poor on captions", "image_to_text", ["decoupled", "text_only"], ["unified"]),
    ("image_only helps images", "image_frechet", ["image_only"], ["unified", "text_only"]),
    ("image_only helps images", "text_to_image", ["image_only"], ["unified", "text_only"]),
    ("text_only helps captions", "text_valid", ["text_only"], ["unified", "image_only"]),
    ("text_only helps captions", "image_to_text", ["text_only"], ["unified", "image_only"]),
]


@dataclasses.dataclass(frozen=True)
class VariantResult:
    """Metrics of one trained model; shares lie in [0, 1].

    image_frechet: Fréchet distance, in the classifier's features, between joint samples and training images.
    text_valid: joint captions that could occur in the data set. agreement: joint pairs whose image shows, to the
    classifier, what the caption says. text_to_image: images that show what their caption says. image_to_text: captions
    of held-out images that are right. seconds: training and sampling.
    """

    variant: str
    seed: int
    image_frechet: float
    text_valid: float
    agreement: float
    text_to_image: float
    image_to_text: float
    seconds: float

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {getattr(self, name):.4g}" for name in METRICS)
        return f"{self.variant} seed {self.seed}: {metrics}, {self.seconds:.0f} s"


def results_table(rows: list[VariantResult], real: dict[str, float]) -> Table:
    """Mean ± standard deviation over seeds, one row per variant, and the values of real pairs."""
    table = Table(title="Noise schedules at equal budget", title_justify="left", box=None, pad_edge=False)
    table.add_column("times")
    for heading in (*(heading for heading, _ in METRICS.values()), "seeds", "seconds"):
        table.add_column(heading, justify="right")
    for variant in VARIANTS:
        runs = [row for row in rows if row.variant == variant]
        if runs:
            cells = [_cell(runs, name) for name in METRICS]
            table.add_row(variant, *cells, str(len(runs)), f"{np.mean([row.seconds for row in runs]):.0f}")
    cells = [f"{real[name]:.3f}" if name in real else "–" for name in METRICS]
    table.add_row("real held-out pairs", *cells, "", "")
    return table


def _cell(runs: list[VariantResult], name: str) -> str:
    mean, spread = summary(runs, name)
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if len(runs) > 1 else "")


def claims_table(rows: list[VariantResult]) -> Table:
    """Each statement: the weakest variant of the better group against the strongest of the worse group.

    A statement "holds" or "fails" if the means differ by more than two standard errors, else it is "open".
    """
    table = Table(title="Statements of the paper, here", title_justify="left", box=None, pad_edge=False)
    for heading in ("statement", "metric", "", "by", "± 2 s.e.", "closest pair"):
        table.add_column(heading, justify="right" if heading in ("by", "± 2 s.e.") else "left")
    for claim, name, better, worse in CLAIMS:
        runs = {variant: [row for row in rows if row.variant == variant] for variant in (*better, *worse)}
        if all(len(own) > 1 for own in runs.values()):
            stats = {variant: (*summary(own, name), len(own)) for variant, own in runs.items()}
            word, difference, error, pair = verdict(stats, name, better)
            table.add_row(claim, name, word, f"{difference:+.3f}", f"{error:.3f}", " vs ".join(pair))
    table.caption = None if table.row_count else "needs two seeds of every variant"
    return table


def verdict(
    stats: dict[str, tuple[float, float, int]], name: str, better: list[str]
) -> tuple[str, float, float, tuple[str, str]]:
    """(holds, fails or open; difference of means; two standard errors of it; the pair of variants).

    The difference is positive where it supports the statement. The closest pair across the two groups decides.

    Args:
        stats: {variant: (mean, standard deviation, seeds)} of both groups.
        name: the metric. better: the variants of the better group.
    """
    sign = 1.0 if METRICS[name][1] else -1.0
    found = []
    for b in better:
        for w in stats.keys() - set(better):
            error = 2.0 * float(np.hypot(_standard_error(stats[b]), _standard_error(stats[w])))
            found.append((sign * (stats[b][0] - stats[w][0]), error, (b, w)))
    difference, error, pair = min(found)
    if abs(difference) <= error:
        word = "open"
    else:
        word = "holds" if difference > 0 else "fails"
    return word, difference, error, pair


def _standard_error(stats: tuple[float, float, int]) -> float:
    return stats[1] / stats[2] ** 0.5


def summary(rows: list[VariantResult], name: str) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) of a metric over runs; 0 for a single one."""
    values = [getattr(row, name) for row in rows]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
