"""Parts of a call on a GPU that train models to measure their quality: tables and emoji."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .session import ROOT, Session, Unfinished

if TYPE_CHECKING:
    import pandas as pd

    from ...train.trainer import Trainer

PAPER_RUN = "adult-paper-0"  # the run of the official table recipe


def table_default(session: Session) -> None:
    """Shape, Trend and copies on Adult for three seeds; MLE is computed later from the rows that are stored here."""
    from rich.console import Console

    from ...train.data.bundled import BUNDLED
    from ..table.quality import quality
    from ..table.recipes import recipes

    tiny = ["train.steps=20", "sample.steps=2", "network.width=8", "network.depth=1"] if session.tiny else []
    synthesize = recipes(session.runs, device=session.device, overrides=tiny)
    data, out, quiet = BUNDLED["adult"].parent, session.files / "rows.json", Console(quiet=True)
    for seed in range(1 if session.tiny else 3):
        found = quality(["adult"], [seed], ["default"], synthesize, data, out, "official", quiet, False)
        (row,) = (row for row in found if row.seed == seed)
        name = f"table default: adult, seed {seed}"
        about = {"seed": seed, "evaluations": row.evaluations, "parameters": row.parameters}
        for metric in ("shape", "trend", "copies", "holdout_copies"):
            session.log.add(f"{name}: {metric}", {"fast": 100 * getattr(row, metric)}, "%", **about)
        session.log.add(f"{name}: fit and sample", {"fast": row.seconds}, "s", False, **about)


def table_paper(session: Session) -> None:
    """The official recipe on Adult: as many of its 480,000 steps as the time allows, then Shape and Trend."""
    from ..speed.table import trainer

    overrides = [f"compile={session.compile}"]
    if session.tiny:
        overrides += ["train.steps=20", "sample.steps=2", "train.batch=64"]
    run = trainer(session.torch_device, overrides, "paper", session.runs / PAPER_RUN)
    total, every = run.config.train.steps, 5 if session.tiny else 2000
    stop = 10 if session.tiny else total
    reserve = 0 if session.tiny else 75  # seconds for sampling and metrics
    name = "table paper: adult, training steps per second, logs and checkpoints included"
    _train(session, run, name, stop, every, reserve, since_start=True)
    synthetic = _sample_table(session, run)
    _table_metrics(session, run, synthetic)
    if run.state.step < total and not session.tiny:
        raise Unfinished(f"step {run.state.step:,} of {total:,}")


def _train(
    session: Session, run: Trainer, name: str, stop: int, every: int, reserve: float, since_start: bool = False
) -> None:
    """Train up to step `stop` or until `reserve` seconds are left, and record the rate after every `every` steps.

    since_start: the rate is the mean since the start of this part, not of the last `every` steps.
    """
    total = run.config.train.steps
    began, before = time.time(), run.state.step
    while run.state.step < stop and session.seconds_left() > reserve:
        if not since_start:
            began, before = time.time(), run.state.step
        run.run(stop=min(run.state.step + every, total))
        rate = (run.state.step - before) / (time.time() - began)
        session.log.add(name, {"fast": rate}, "1/s", step=run.state.step, of=total)


def _sample_table(session: Session, run: Trainer) -> pd.DataFrame:
    """As many synthetic rows as there are training rows, also written as CSV."""
    from ...sample.table.rows import TableSampler
    from ...train.data.bundled import load_bundled

    n = 200 if session.tiny else len(load_bundled()[0])
    began = time.time()
    synthetic = TableSampler(run.ema_pipeline()).sample(n)
    rate = n / (time.time() - began)
    session.log.add("table paper: adult, sampling", {"fast": rate}, "rows/s", **_about(run, n))
    synthetic.to_csv(session.files / f"adult-paper-{run.state.step}.csv.gz", index=False)
    return synthetic


def _table_metrics(session: Session, run: Trainer, synthetic: pd.DataFrame) -> None:
    from ...model.codecs.table.schema import Schema
    from ...train.data.bundled import BUNDLED, load_bundled
    from ..table.columns import roles_of
    from ..table.metrics import copied, density

    train, _ = load_bundled()
    roles = roles_of(train, Schema.load(BUNDLED["adult"] / "schema.yaml"))
    quality = density(train, synthetic, roles)
    values = {"shape": quality.shape, "trend": quality.trend, "copies": copied(train, synthetic, roles)}
    for metric, value in values.items():
        session.log.add(f"table paper: adult, {metric}", {"fast": 100 * value}, "%", **_about(run, len(synthetic)))


def _about(run: Trainer, rows: int) -> dict:
    settings = run.config
    return {"step": run.state.step, "of": settings.train.steps, "rows": rows, "evaluations": settings.sample.steps}


def emoji(session: Session) -> None:
    """The three stages of emoji, an evaluation on held-out pairs and two contact sheets."""
    from ..quality.hooks import evaluate

    packed = _pack_emoji(session)
    for stage in (1, 2, 3):
        run = _emoji_stage(session, packed, stage)
    if session.tiny:
        for name, value in evaluate(run).items():
            session.log.add(f"emoji: {name}", {"fast": value}, "")
        return
    last = session.runs / "emoji_stage3"
    anystate("eval", last, "--data", packed, "--json", session.files / "emoji.json")
    for condition in ("text", "image"):
        out = session.runs / f"emoji_given_{condition}"
        options = ("--condition", condition, "--limit", "64", "--out", out, "--force")
        anystate("sample", last, "--data", packed, *options)
        shutil.copy(out / "sheet.png", session.files / f"emoji-given-{condition}.png")


def _pack_emoji(session: Session) -> Path:
    """The packed data set in the working directory, packed if it is missing."""
    pairs, packed = find_emoji(), session.workdir / "data/emoji"
    if pairs is None:
        raise ValueError(
            "emoji.npz is neither in data/emoji of the checkout nor in $ANYSTATE_DATA/emoji: copy it there"
        )
    if not (packed / "dataset.yaml").is_file():
        anystate("data", "pack", pairs, "--out", packed, "--text", "bpe", "--states", "512", "--length", "20")
    return packed


def _emoji_stage(session: Session, packed: Path, stage: int) -> Trainer:
    """Train one stage to its end.

    Raises:
        Unfinished: the time is over.
    """
    from ...configs.load import load_config
    from ...train.trainer import Trainer

    overrides = [f"data.source={packed}", f"modalities.text.tokenizer.path={packed / 'text.tokenizer.json'}"]
    if session.tiny:
        overrides += ["train.batch=8", "train.steps=2", "network.depth=1", "compile=never", "sample.steps=2"]
        overrides += ["modalities.image.stream.width=48", "modalities.text.stream.width=48"]
    if stage > 1:
        overrides.append(f"init.checkpoint={session.runs / f'emoji_stage{stage - 1}'}")
    config = load_config(f"emoji/stage{stage}", overrides)
    run = Trainer(config, session.runs / f"emoji_stage{stage}", session.torch_device)
    total = config.train.steps
    _train(session, run, f"emoji: stage {stage}, steps per second", total, 500, 20)
    if run.state.step < total:
        raise Unfinished(f"stage {stage}, step {run.state.step:,} of {total:,}")
    return run


def find_emoji() -> Path | None:
    """The file of emoji pairs in the data folders, if it is there."""
    folders = [ROOT / "data", Path(os.environ.get("ANYSTATE_DATA", ROOT / "data")), ROOT.parent / "shared/data"]
    for folder in folders:
        if (folder / "emoji/emoji.npz").is_file():
            return folder / "emoji/emoji.npz"
    return None


def anystate(*arguments: object) -> None:
    """Run a command of this package."""
    subprocess.run([sys.executable, "-m", "anystate", *map(str, arguments)], check=True)
