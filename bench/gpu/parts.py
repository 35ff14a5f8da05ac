"""The parts of the three calls on a GPU, the most important ones first; `bench.gpu.window` runs them.

In every part ours is measured before the reference, and a part imports what it needs when it starts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from .quality_parts import emoji, table_default, table_paper
from .session import ROOT, Part, Session

PLAIN_PARTS = 4  # parts of an official batch, each small enough for the reference on any of these GPUs

# First call: correctness, speed of a training step, block sizes


def limits(session: Session) -> None:
    """Driver and versions, speed of a copy and of matrix products."""
    from .sweep import limits

    if shutil.which("nvidia-smi"):
        print(subprocess.run("nvidia-smi", capture_output=True, text=True, check=False).stdout)
    versions = session.log.provenance["versions"]
    print("; ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    limits(session.log, session.device, session.size)


def verify(session: Session) -> None:
    from ..speed.verify import verify

    size = "tiny" if session.tiny else "small"
    if not verify(device=session.device, size=size, log=session.quiet_log()):
        raise ValueError("an operation differs from its reference")


def smoke(session: Session) -> None:
    from .smoke import STEPS, smoke

    smoke(session.log, session.torch_device, 3 if session.tiny else STEPS)


def train_official(session: Session) -> None:
    from ..speed.train import train

    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    steps = 2 if session.tiny else 20
    device, log = session.torch_device, session.log
    train(session.size, device, log, session.compile, steps, trace=session.files, parts={"fast": 1})


def kernels(session: Session) -> None:
    from ..speed.kernels import run

    ops = [
        "linear_cross_entropy",
        "linear_cross_entropy_sum",
        "adaln_modulate_fp32_stream",
        "gated_residual_fp32_stream",
        "qk_norm_pack",
    ]
    ops += ["joint_attention", "joint_attention_padded", "tau_leap_linear", "adaln_modulate", "gated_residual"]
    ops += ["tau_leap_50_steps"]  # last, because each eager measurement takes seconds
    plot, log = session.files / "kernels.png", session.quiet_log()
    if run(ops, session.size, plot=plot, device=session.device, log=log, compile=False):
        raise ValueError("not every operation ran")


def sweep(session: Session) -> None:
    from .sweep import sweep

    sweep(session.log, session.device, session.size)


# Second call: sampling, tables, the reference, tests of the kernels


def sample_official(session: Session) -> None:
    from ..speed.sample import sampling

    batches, steps = ([4], [4]) if session.tiny else (None, None)
    sampling(session.size, session.torch_device, session.log, session.compile, batches, steps, 2, ["text"])


def table_train(session: Session) -> None:
    from ..speed.table import training

    recipe, steps = ("default", 2) if session.tiny else ("paper", 100)
    training(session.torch_device, session.log, recipe, session.compile, steps)


def table_sample(session: Session) -> None:
    from ..speed.table import sampling

    recipe, n, steps = ("default", 64, 4) if session.tiny else ("paper", 4096, 1000)
    sampling(session.torch_device, session.log, recipe, session.compile, n, steps, rounds=1, steps=steps)


def train_official_plain(session: Session) -> None:
    from ..speed.train import train

    steps = 2 if session.tiny else 5
    train(session.size, session.torch_device, session.log, session.compile, steps, parts={"plain": PLAIN_PARTS})


def kernel_tests(session: Session) -> None:
    """The tests of the kernels, without those that only compile and need no GPU."""
    tests = ROOT / "tests/kernels"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", ROOT / "tests/pytest.ini"]
    command += [f"--confcutdir={tests}", f"--ignore={tests / 'test_compiled.py'}"]
    command += [tests / "test_tiles.py"] if session.tiny else [tests, "-n", "12", "--tb=short", "-rfE"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    for line in process.stdout:
        output.append(line)
        print(line, end="", flush=True)
    counts = re.findall(r"(\d+) (passed|failed|error|skipped)", output[-1])
    session.log.add("kernel tests", {outcome: float(n) for n, outcome in counts}, "tests")
    if process.wait():
        raise ValueError(f"the kernels' tests ended with {output[-1].strip()}")


def fp8(session: Session) -> None:
    """Compare fp8 with bf16; runs only by name."""
    from ..speed.train import fp8

    if session.tiny:
        os.environ["ANYSTATE_EMULATE_FP8"] = "1"
    size, steps = ("wide", 2) if session.tiny else ("official", 30)
    fp8(size, session.torch_device, session.log, session.compile, steps)


CALLS = {
    1: (
        Part("limits", 40, limits),
        Part("verify", 80, verify, interpreted=True),
        Part("smoke", 100, smoke),
        Part("train-official", 170, train_official),
        Part("kernels", 95, kernels),
        Part("sweep", 70, sweep, interpreted=True),
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
