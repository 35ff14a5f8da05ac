"""`anystate bench all`: every benchmark of speed in one run, as one JSON file and one page with plots."""

from __future__ import annotations

import base64
import html as html_format
import io
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from .kernels import run as kernels
from .rows import Row, Rows
from .sample import sampling
from .scaling import growth
from .table import speed
from .train import fp8, train


def everything(
    device: torch.device, json: Path, html: Path | None, quick: bool, seconds: float, console: Console
) -> int:
    """Run every part until the time is up; returns an exit code, 1 if a part failed or was left out.

    Args:
        quick: tiny sizes and few steps, to see that everything runs.
        seconds: no part begins later; rows of finished parts are kept whatever happens.
    """
    began, rows, missing = time.perf_counter(), Rows(device, json), []
    folder = json.with_name(f"{json.stem}-more")  # profiles, traces, plots
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts(device, rows, quick, folder).items():
        spent, lost = time.perf_counter() - began, None
        try:
            if spent > seconds:
                lost = f"{name}: left out, {spent:.0f} s had passed"
            else:
                part()
        except Exception as error:  # whatever a compiler or driver raises: the others still count
            lost = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
        if lost:
            missing.append(lost)
            console.print(lost, style="red", highlight=False)
        if html is not None:  # after every part: a kill leaves the page of those before
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(page(rows, missing, folder), encoding="utf-8")
    console.print(f"{time.perf_counter() - began:.0f} seconds; wrote {json}" + (f" and {html}" if html else ""))
    return int(bool(missing))


def parts(device: torch.device, rows: Rows, quick: bool, folder: Path) -> dict[str, Callable[[], None]]:
    """{name: function} in the order of importance."""
    gpu = device.type == "cuda"
    compile = "never" if quick else "always"
    sizes = ["tiny"] if quick else (["official", "digits"] if gpu else ["digits"])
    steps, rounds = (3, 1) if quick else (20, 3)
    found: dict[str, Callable[[], None]] = {}
    for size in sizes:
        found[f"train {size}"] = lambda s=size: train(s, device, rows, compile, steps, trace=folder)
        found[f"sample {size}"] = lambda s=size: sampling(s, device, rows, compile, rounds=rounds)
    for recipe in ["default"] if quick or not gpu else ["paper", "default"]:
        # sampling by the official 1,000 steps is measured in full unless this is a trial
        table = {"n": 64, "official_steps": 20} if quick else {}
        found[f"table {recipe}"] = lambda r=recipe, t=table: speed(
            device, rows, r, "never" if quick else "always", steps, trace=folder, **t
        )
    if gpu and not quick:
        found["train official, fp8"] = lambda: fp8("official", device, rows, compile, steps)
    found["growth"] = lambda: growth("tiny" if quick or not gpu else "digits", device, rows, folder)
    size = "tiny" if quick else ("official" if gpu else "small")
    found["kernels"] = lambda: _kernels(size, device, folder)
    return found


def _kernels(size: str, device: torch.device, folder: Path) -> None:
    kernels(size=size, json=folder / "kernels.json", plot=folder / "kernels.png", device=str(device))


def page(rows: Rows, missing: list[str], folder: Path) -> str:
    """One page: bars of the ratios, the plots in the folder, every row."""
    origin = rows.origin
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    about = f"{origin['device']}, {versions}, commit {origin['commit']}, {origin['date']}"
    pictures = [_embed(ratios(rows.rows))] if any(row.ratio_to_plain for row in rows.rows) else []
    pictures += [_embed((folder / f).read_bytes()) for f in ("growth.png", "kernels.png") if (folder / f).is_file()]
    lines = "".join(
        f"<tr><td>{html_format.escape(row.name)}<td>{row.engine}<td>{row.value:.5g}<td>{row.unit}"
        f"<td>{'' if row.ratio_to_plain is None else f'{row.ratio_to_plain:.2f}'}</tr>"
        for row in rows.rows
    )
    notes = "".join(f"<p><b>{html_format.escape(line)}</b></p>" for line in missing)
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.15em .8em;text-align:left}"
    return (
        f"<!doctype html><meta charset=utf-8><title>anystate bench</title><style>{style} img{{max-width:100%}}</style>"
        f"<h1>anystate bench</h1><p>{html_format.escape(about)}</p>{notes}{''.join(pictures)}"
        f"<table><tr><th>what<th>engine<th>value<th>unit<th>ratio to plain</tr>{lines}</table>\n"
    )


def ratios(rows: list[Row]) -> bytes:
    """Bars: how many times better than the plain engine, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    better = [row for row in rows if row.ratio_to_plain]
    figure = Figure(figsize=(10, 1 + 0.26 * len(better)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([row.name for row in better], [row.ratio_to_plain for row in better], color="#4878a8")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times better than the plain engine")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _embed(png: bytes) -> str:
    return f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
