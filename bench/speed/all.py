"""`anystate bench all`: every benchmark of speed in one run, as one JSON file and one page with figures."""

from __future__ import annotations

import base64
import functools
import html as html_format
import io
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from .kernels import run as kernels
from .results import Result, ResultLog
from .sample import sampling
from .scaling import measure_scaling
from .table import speed
from .train import fp8, train

STYLE = (
    "body{font:15px sans-serif;max-width:70em;margin:2em auto}"
    "td,th{padding:.15em .8em;text-align:left} img{max-width:100%}"
)


def run_all(device: torch.device, json: Path, html: Path | None, quick: bool, seconds: float, console: Console) -> int:
    """Run every benchmark until the time is up; returns an exit code, 1 if one failed or was left out.

    Args:
        quick: tiny sizes and few steps, to check that everything runs.
        seconds: no benchmark starts later; results of completed ones are kept in any case.
    """
    began, log = time.perf_counter(), ResultLog(device, json)
    missing: list[str] = []
    folder = json.with_name(f"{json.stem}-more")  # profiles, traces, figures
    folder.mkdir(parents=True, exist_ok=True)
    for name, benchmark in benchmarks(device, log, quick, folder).items():
        spent, failure = time.perf_counter() - began, None
        if spent > seconds:
            failure = f"{name}: left out, {spent:.0f} s had passed"
        else:
            failure = _failure(name, benchmark)
        if failure:
            missing.append(failure)
            console.print(failure, style="red", highlight=False)
        if html is not None:  # after every benchmark, so that an interrupted run leaves a page
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(page(log, missing, folder), encoding="utf-8")
    console.print(f"{time.perf_counter() - began:.0f} seconds; wrote {json}" + (f" and {html}" if html else ""))
    return int(bool(missing))


def _failure(name: str, benchmark: Callable[[], object]) -> str | None:
    """Run a benchmark; the message if it fails."""
    try:
        benchmark()
    except Exception as error:  # whatever a compiler or driver raises: the other benchmarks still run
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def benchmarks(device: torch.device, log: ResultLog, quick: bool, folder: Path) -> dict[str, Callable[[], object]]:
    """{name: function}, the most important ones first."""
    gpu = device.type == "cuda"
    if quick:
        return _quick_benchmarks(device, log, folder)
    call, found = functools.partial, {}
    for size in ("official", "digits") if gpu else ("digits",):
        found[f"train {size}"] = call(train, size, device, log, "always", 20, trace=folder)
        found[f"sample {size}"] = call(sampling, size, device, log, "always", rounds=3)
    for recipe in ("paper", "default") if gpu else ("default",):
        found[f"table {recipe}"] = call(speed, device, log, recipe, "always", 20, trace=folder)
    if gpu:
        found["train official, fp8"] = call(fp8, "official", device, log, "always", 20)
    found["scaling"] = call(measure_scaling, "digits" if gpu else "tiny", device, log, folder)
    found["kernels"] = call(_kernels, "official" if gpu else "small", device, folder)
    return found


def _quick_benchmarks(device: torch.device, log: ResultLog, folder: Path) -> dict[str, Callable[[], object]]:
    """The same at tiny sizes, without compiling."""
    call = functools.partial
    return {
        "train tiny": call(train, "tiny", device, log, "never", 3, trace=folder),
        "sample tiny": call(sampling, "tiny", device, log, "never", rounds=1),
        "table default": call(speed, device, log, "default", "never", 3, trace=folder, n=64, official_steps=20),
        "scaling": call(measure_scaling, "tiny", device, log, folder),
        "kernels": call(_kernels, "tiny", device, folder),
    }


def _kernels(size: str, device: torch.device, folder: Path) -> None:
    kernels(size=size, json=folder / "kernels.json", plot=folder / "kernels.png", device=str(device))


def page(log: ResultLog, missing: list[str], folder: Path) -> str:
    """An HTML page: a bar plot of the ratios, the figures in the folder, all results."""
    where = log.provenance
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    about = f"{where['device']}, {versions}, commit {where['commit']}, {where['date']}"
    figures = [plot_ratios(log.results)] if any(result.ratio_to_plain for result in log.results) else []
    for name in ("scaling.png", "kernels.png"):
        if (folder / name).is_file():
            figures.append((folder / name).read_bytes())
    notes = "".join(f"<p><b>{html_format.escape(line)}</b></p>" for line in missing)
    return (
        f"<!doctype html><meta charset=utf-8><title>anystate bench</title><style>{STYLE}</style>"
        f"<h1>anystate bench</h1><p>{html_format.escape(about)}</p>{notes}{''.join(map(_embed, figures))}"
        f"<table><tr><th>measured<th>implementation<th>value<th>unit<th>ratio to the reference</tr>"
        f"{''.join(map(_table_row, log.results))}</table>\n"
    )


def _table_row(result: Result) -> str:
    ratio = "" if result.ratio_to_plain is None else f"{result.ratio_to_plain:.2f}"
    return (
        f"<tr><td>{html_format.escape(result.name)}<td>{result.engine}<td>{result.value:.5g}<td>{result.unit}"
        f"<td>{ratio}</tr>"
    )


def plot_ratios(results: list[Result]) -> bytes:
    """Bar plot of the ratios to the reference, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = [result for result in results if result.ratio_to_plain]
    figure = Figure(figsize=(10, 1 + 0.26 * len(compared)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([result.name for result in compared], [result.ratio_to_plain for result in compared], color="#4878a8")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ratio to the reference (larger is better)")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _embed(png: bytes) -> str:
    return f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
