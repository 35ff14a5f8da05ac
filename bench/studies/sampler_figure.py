"""The figure of `anystate bench samplers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def title_of(panel: str) -> str:
    """The title of a panel; stored results call images pictures."""
    return panel.replace("pictures", "images")


def plot(points: list[dict], file: Path) -> None:
    """Write a figure with one panel per metric and one line per sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(p["panel"] for p in points))
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.9 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes.flat, panels, strict=False):
        _plot_panel(ax, panel, [p for p in points if p["panel"] == panel])
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _plot_panel(ax: Axes, panel: str, points: list[dict]) -> None:
    for label in dict.fromkeys(p["sampler"] for p in points):
        line = sorted((p["evaluations"], p["value"]) for p in points if p["sampler"] == label)
        if label == "real":
            ax.axhline(line[0][1], color="black", linestyle=":", linewidth=1, label="real held-out data")
        else:
            style = "--" if label.endswith("linear") else "-"
            ax.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1.4, linestyle=style, label=label)
    ax.set(xlabel="NFE per sample", xscale="log", yscale="log")
    ax.set_title(title_of(panel), fontsize=10)
    _set_ticks(ax, max(p["evaluations"] for p in points))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=7)


def _set_ticks(ax: Axes, largest: int) -> None:
    """Plain numbers at the ticks of both logarithmic axes."""
    from matplotlib import ticker

    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    ax.set_xticks([nfe for nfe in (2, 4, 6, 10, 20, 40, 80) if nfe <= largest])
    ax.xaxis.set_major_formatter(plain)
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5, 7)))
    ax.yaxis.set_minor_formatter(plain)
    ax.tick_params(which="minor", labelsize=7)
