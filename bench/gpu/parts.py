"""The parts of the three calls on a GPU, in the order of what matters most: see `gpu_window`, which runs them.

Ours comes before the plain engine everywhere, and each part imports what it needs when it begins.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..speed.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
PLAIN_PARTS = 4  # of an official batch that the plain engine surely fits into memory
PAPER = "adult-paper-0"  # the run of the official table recipe


@dataclasses.dataclass
class Session:
    """What a part is given. more: folder for files beside the rows; kept: what stays on the machine between calls."""

    device: str
    rows: Rows
    more: Path
    kept: Path
    tiny: bool
    end: float

    def left(self) -> float:
        return self.end - time.time()

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)

    @property
    def compile(self) -> str:
        return "never" if self.tiny else "always"

    def quiet_rows(self) -> Rows:
        """The same rows for what prints lines of its own."""
        from ..speed.rows import Rows

        return Rows(self.device, self.rows.file, lambda line: None)


@dataclasses.dataclass(frozen=True)
class Part:
    """seconds: its limit, if the parts before it took all of theirs; interpreted: its kernels need Triton's interpreter
    where there is no GPU."""

    name: str
    seconds: int
    run: Callable[[Session], None]
    interpreted: bool = False


class Unfinished(Exception):
    """A part used its time well and has more to do; the message says how far it is."""


# First call: is it right, how fast is a training step, which block sizes


def limits(s: Session) -> None:
    from .sweep import limits

    if shutil.which("nvidia-smi"):
        print(subprocess.run("nvidia-smi", capture_output=True, text=True, check=False).stdout)
    print("; ".join(f"{name} {version}" for name, version in s.rows.origin["versions"].items()), flush=True)
    limits(s.rows, s.device, size(s))


def verify(s: Session) -> None:
    from ..speed.verify import verify

    if not verify(device=s.device, size="tiny" if s.tiny else "small", rows=s.quiet_rows()):
        raise ValueError("an operation differs from its reference")


def smoke(s: Session) -> None:
    from .smoke import STEPS, smoke

    smoke(s.rows, s.torch_device, 3 if s.tiny else STEPS)


def train_official(s: Session) -> None:
    from ..speed.train import train

    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    name, steps = ("tiny", 2) if s.tiny else ("official", 20)
    train(name, s.torch_device, s.rows, s.compile, steps, trace=s.more, parts={"fast": 1})


def kernels(s: Session) -> None:
    from ..speed.kernels import run

    ops = ["linear_cross_entropy", "adaln_modulate_fp32_stream", "gated_residual_fp32_stream", "qk_norm_pack"]
    ops += ["joint_attention", "joint_attention_padded", "tau_leap_linear", "adaln_modulate", "gated_residual"]
    ops += ["tau_leap_50_steps"]  # last: seconds for each of the eager ones
    if run(ops, size(s), plot=s.more / "kernels.png", device=s.device, rows=s.quiet_rows(), compile=False):
        raise ValueError("not every operation ran")


def sweep(s: Session) -> None:
    from .sweep import sweep

    sweep(s.rows, s.device, size(s))


# Second call: sampling, tables, the plain engine, the kernels' tests


def sample_official(s: Session) -> None:
    from ..speed.sample import sampling

    name, batches, steps = ("tiny", [4], [4]) if s.tiny else ("official", None, None)
    sampling(name, s.torch_device, s.rows, s.compile, batches, steps, 2, ["text"])


def table_train(s: Session) -> None:
    from ..speed.table import training

    training(s.torch_device, s.rows, "default" if s.tiny else "paper", s.compile, 2 if s.tiny else 100)


def table_sample(s: Session) -> None:
    from ..speed.table import sampling

    recipe, n, steps = ("default", 64, 4) if s.tiny else ("paper", 4096, 1000)
    sampling(s.torch_device, s.rows, recipe, s.compile, n, steps, rounds=1, steps=steps)


def train_official_plain(s: Session) -> None:
    from ..speed.train import train

    name, steps = ("tiny", 2) if s.tiny else ("official", 5)
    train(name, s.torch_device, s.rows, s.compile, steps, parts={"plain": PLAIN_PARTS})


def kernel_tests(s: Session) -> None:
    """Those of the GPU's own; the ones that compile without a GPU have run elsewhere."""
    tests = ROOT / "tests/kernels"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", ROOT / "tests/pytest.ini"]
    command += [f"--confcutdir={tests}", f"--ignore={tests / 'test_compiled.py'}"]
    command += [tests / "test_tiles.py"] if s.tiny else [tests, "-n", "8"]
    done = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    for line in done.stdout:
        output.append(line)
        print(line, end="", flush=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", output[-1])}
    s.rows.add("kernel tests", {what: float(n) for what, n in counts.items()}, "tests")
    if done.wait():
        raise ValueError(f"the kernels' tests ended with {output[-1].strip()}")


# Third call: tables in earnest


def table_default(s: Session) -> None:
    """Three seeds on Adult, each with its Shape, Trend and copies; MLE is computed at home, from the rows kept here."""
    from rich.console import Console

    from ...train.data.bundled import BUNDLED
    from ..table.quality import quality
    from ..table.recipes import recipes

    tiny = ["train.steps=20", "sample.steps=2", "network.width=8", "network.depth=1"] if s.tiny else []
    ours = recipes(s.kept / "runs", device=s.device, overrides=tiny)
    for seed in range(1 if s.tiny else 3):
        out = s.more / "rows.json"
        found = quality(
            ["adult"], [seed], ["default"], ours, BUNDLED["adult"].parent, out, "official", Console(quiet=True), False
        )
        (row,) = (row for row in found if row.seed == seed)
        about = {"seed": seed, "evaluations": row.evaluations, "parameters": row.parameters}
        for what in ("shape", "trend", "copies", "holdout_copies"):
            s.rows.add(f"table default: adult, seed {seed}: {what}", {"fast": 100 * getattr(row, what)}, "%", **about)
        s.rows.add(f"table default: adult, seed {seed}: fit and sample", {"fast": row.seconds}, "s", False, **about)


def table_paper(s: Session) -> None:
    """The official recipe on Adult, as many of its 480,000 steps as the time allows, then its Shape and Trend."""
    from ...sample.table.rows import Generator
    from ...train.data.bundled import BUNDLED
    from ..speed.table import trainer
    from ..table.columns import load_schema, read_table, roles_of
    from ..table.metrics import copied, density

    tiny = ["train.steps=20", "sample.steps=2", "train.batch=64"] if s.tiny else []
    made = trainer(s.torch_device, "fast", [f"compile={s.compile}", *tiny], "paper", s.kept / "runs" / PAPER)
    began, before, total, every = time.time(), made.step, made.config.train.steps, 5 if s.tiny else 2000
    reserve = 0 if s.tiny else 75  # to sample and to compare
    while made.step < total and s.left() > reserve and not (s.tiny and made.step >= 10):
        made.run(stop=min(made.step + every, total))
        rate = (made.step - before) / (time.time() - began)
        about = {"step": made.step, "of": total}
        s.rows.add(
            "table paper: adult, training steps per second, logs and checkpoints included",
            {"fast": rate},
            "1/s",
            **about,
        )
    folder = BUNDLED["adult"]
    schema = load_schema(folder / "schema.yaml")
    train = read_table(folder / "train.csv.gz", schema)
    roles, n, began = roles_of(train, schema), 200 if s.tiny else len(train), time.time()
    synth = Generator(made.averaged()).table(n)
    about = {"step": made.step, "of": total, "rows": n, "evaluations": made.config.sample.steps}
    s.rows.add("table paper: adult, sampling", {"fast": n / (time.time() - began)}, "rows/s", **about)
    synth.to_csv(s.more / f"adult-paper-{made.step}.csv.gz", index=False)
    near = density(train, synth, roles)
    values = {"shape": near.shape, "trend": near.trend, "copies": copied(train, synth, roles)}
    for what, value in values.items():
        s.rows.add(f"table paper: adult, {what}", {"fast": 100 * value}, "%", **about)
    if made.step < total and not s.tiny:
        raise Unfinished(f"step {made.step:,} of {total:,}")


# Asked for by name


def fp8(s: Session) -> None:
    from ..speed.train import fp8

    if s.tiny:
        os.environ["ANYSTATE_EMULATE_FP8"] = "1"
    fp8("wide" if s.tiny else "official", s.torch_device, s.rows, s.compile, 2 if s.tiny else 30)


def emoji(s: Session) -> None:
    """The three stages, an evaluation on held-out pairs and two contact sheets."""
    from ...configs.load import load_config
    from ...train.trainer import Trainer
    from ..quality.hooks import evaluate

    pairs, packed, runs = find_emoji(), s.kept / "data/emoji", s.kept / "runs"
    if pairs is None:
        raise ValueError("emoji.npz is neither in data/emoji of the checkout nor in $ANYSTATE_DATA/emoji: bring it")
    if not (packed / "dataset.yaml").is_file():
        command("data", "pack", pairs, "--out", packed, "--text", "bpe", "--states", "512", "--length", "20")
    tiny = ["train.batch=8", "train.steps=2", "network.depth=1", "compile=never", "sample.steps=2"] if s.tiny else []
    tiny += [f"modalities.{m}.stream.width=48" for m in ("image", "text")] if s.tiny else []
    for stage in (1, 2, 3):
        own = [f"data.path={packed}", f"modalities.text.tokenizer.path={packed / 'tokenizer.json'}", *tiny]
        own += [f"init.checkpoint={runs / f'emoji_stage{stage - 1}'}"] if stage > 1 else []
        trainer = Trainer(load_config(f"emoji/stage{stage}", own), runs / f"emoji_stage{stage}", s.torch_device)
        total = trainer.config.train.steps
        while trainer.step < total and s.left() > 20:
            began, before = time.time(), trainer.step
            trainer.run(stop=min(trainer.step + 500, total))
            rate = (trainer.step - before) / (time.time() - began)
            s.rows.add(f"emoji: stage {stage}, steps per second", {"fast": rate}, "1/s", step=trainer.step, of=total)
        if trainer.step < total:
            raise Unfinished(f"stage {stage}, step {trainer.step:,} of {total:,}")
    for name, value in evaluate(trainer).items() if s.tiny else ():
        s.rows.add(f"emoji: {name}", {"fast": value}, "")
    if not s.tiny:
        run = runs / "emoji_stage3"
        command("eval", run, "--data", packed, "--json", s.more / "emoji.json")
        for given in ("text", "image"):
            out = runs / f"emoji_given_{given}"
            command("sample", run, "--data", packed, "--given", given, "--limit", "64", "--out", out, "--force")
            shutil.copy(out / "sheet.png", s.more / f"emoji-given-{given}.png")


def find_emoji() -> Path | None:
    folders = [ROOT / "data", Path(os.environ.get("ANYSTATE_DATA", ROOT / "data")), ROOT.parent / "shared/data"]
    return next((f / "emoji/emoji.npz" for f in folders if (f / "emoji/emoji.npz").is_file()), None)


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "anystate", *map(str, words)], check=True)


def size(s: Session) -> str:
    return "tiny" if s.tiny else "official"


CALLS = {
    1: (
        Part("limits", 40, limits),
        Part("verify", 80, verify, interpreted=True),
        Part("smoke", 60, smoke),
        Part("train-official", 170, train_official),
        Part("kernels", 95, kernels),
        Part("sweep", 110, sweep, interpreted=True),
    ),
    2: (
        Part("sample-official", 200, sample_official),
        Part("table-train", 70, table_train),
        Part("table-sample", 70, table_sample),
        Part("train-official-plain", 90, train_official_plain),
        Part("kernel-tests", 125, kernel_tests, interpreted=True),
    ),
    3: (Part("table-default", 180, table_default), Part("table-paper", 375, table_paper)),
}
EXTRA = (Part("fp8", 250, fp8), Part("emoji", 555, emoji))
PARTS = {part.name: part for parts in (*CALLS.values(), EXTRA) for part in parts}
