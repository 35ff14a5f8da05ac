"""What is measured on a GPU that is lent for three calls of ten minutes; `bench/gpu/window.sh 1|2|3` runs this.

A call is a list of parts (`gpu_parts`). Each is a process of its own with a time limit; every measurement is a line in
one file, written at once, so that a limit loses only the rest. A part that ended is not measured again at the same
commit on the same kind of GPU: the same command goes on where it was stopped, and a fresh machine goes on with the
files that an earlier one left in bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from .parts import CALLS, PAPER, PARTS, ROOT, Part, Session, Unfinished

SECONDS = 555  # of a call
RESERVE = 8  # seconds to begin no part in
GRACE = 3  # seconds between a part's interruption and its end by force
UNFINISHED = 3  # exit code of a part that has more to do


def run(call: int, dry: bool, only: list[str] | None, out: Path, kept: Path) -> int:
    """Run a call's parts, or those asked for by name; returns an exit code, 1 if one failed or ran out of time."""
    began = time.time()
    parts = chosen(call, only)
    machine = "dry run" if dry else gpu_name()
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    if dry:  # its small runs are never gone on with, least of all by a real call
        kept = kept / "tried"
        shutil.rmtree(kept, ignore_errors=True)
    results, log = out / f"gpu-{slug}.jsonl", out / f"gpu-{slug}-{call}.txt"
    more = kept / f"more-{slug}-{call}"
    out.mkdir(parents=True, exist_ok=True)
    if dry:
        results.unlink(missing_ok=True)
    else:
        take_up(results, kept, more)
    before = set() if dry else ended(results, machine)
    more.mkdir(parents=True, exist_ok=True)
    lost, unfinished = [], []
    with log.open("a", encoding="utf-8") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        say(f"call {call} on {machine}: " + ", ".join(f"{p.name} ({p.seconds} s)" for p in parts))
        due = 0.0
        for part in parts:
            spent = time.time() - began
            left, due = SECONDS - spent, due + (SECONDS if only else part.seconds)
            if part.name in before:
                say(f"== {part.name}: measured before at this commit")
                continue
            if left < RESERVE:
                say(f"== {part.name}: left out, {SECONDS} s are over")
                lost.append(part.name)
                continue
            limit = min(left, due - spent)  # with what the parts before left unused
            arguments = ["--part", part.name, "--results", results, "--more", more, "--kept", kept]
            code, spent = limited(part, [*arguments, *(["--dry-run"] if dry else [])], limit, dry, say)
            how = {0: "done", UNFINISHED: "goes on with the same command"}.get(code, f"exit {code}")
            say(f"== {part.name}: {how}, after {spent:.0f} s")
            if code:
                (unfinished if code == UNFINISHED else lost).append(part.name)
            if results.is_file() and not dry:
                shutil.copy(results, kept / results.name)
        if any(more.rglob("*")):
            pack(out / f"gpu-{slug}-{call}.tar.gz", kept, more)
        end = f"; to go on: {', '.join(unfinished)}" if unfinished else ""
        end += f"; NOT DONE: {', '.join(lost)}" if lost else ""
        say(f"{time.time() - began:.0f} s in all; rows in {results}{end}")
    return int(bool(lost))


def chosen(call: int, only: list[str] | None) -> list[Part]:
    if only is None:
        return list(CALLS[call])
    if unknown := [name for name in only if name not in PARTS]:
        raise ValueError(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [PARTS[name] for name in only]


def gpu_name() -> str:
    """The GPU as PyTorch names it; asked for without taking any of its memory."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ValueError("no GPU here: official sizes would take hours; --dry-run tries every part small") from None


def take_up(results: Path, kept: Path, more: Path) -> None:
    """Go on from what this machine kept, or else from what an earlier machine left in bench/results."""
    for folder in (kept, ROOT / "bench/results"):
        if not results.is_file() and (folder / results.name).is_file():
            shutil.copy(folder / results.name, results)
    packed = ROOT / "bench/results" / f"{more.name.replace('more-', 'gpu-', 1)}.tar.gz"
    if not more.exists() and packed.is_file():
        with tarfile.open(packed) as archive:
            archive.extractall(kept, filter="data")


def ended(results: Path, machine: str) -> set[str]:
    """Names of the parts that ended well on such a machine at this commit."""
    from ...train.provenance import origin
    from ..speed.rows import read_lines

    commit = origin("cpu")["commit"]
    rows = read_lines(results)
    return {
        row.name.removeprefix("part ")
        for row in rows
        if row.name.startswith("part ") and (row.origin["device"], row.origin["commit"]) == (machine, commit)
    }


def limited(part: Part, arguments: list, limit: float, dry: bool, say: Callable[[str], None]) -> tuple[int, float]:
    """(exit code, seconds) of a part in a process of its own, interrupted at its limit and soon after killed.

    What it leaves running is killed too: it would hold the output open, and compute beside the next part.
    """
    environment = dict(os.environ, PYTHONUNBUFFERED="1", ANYSTATE_WINDOW_END=str(time.time() + limit))
    if dry and part.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "anystate.bench.gpu.window", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        process_group=0,
    )

    def stop(sign: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)

    timers = [threading.Timer(limit + wait, stop, [s]) for wait, s in ((0, signal.SIGINT), (GRACE, signal.SIGKILL))]
    for timer in timers:
        timer.start()
    threading.Thread(target=lambda: (process.wait(), time.sleep(2), stop(signal.SIGKILL)), daemon=True).start()
    try:
        for line in process.stdout:
            say(line.rstrip("\n"))
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        stop(signal.SIGKILL)
    return code, time.time() - began


def pack(file: Path, kept: Path, more: Path) -> None:
    """Files beside the rows, and the newest checkpoint of what goes on."""
    checkpoints = sorted((kept / "runs" / PAPER).glob("step_*"))[-1:]
    with tarfile.open(file, "w:gz") as archive:
        for path in [more, *(checkpoints if more.name.endswith("3") else [])]:
            archive.add(path, path.relative_to(kept))


def run_part(name: str, dry: bool, results: Path, more: Path, kept: Path) -> int:
    """One part in this process."""
    from ..speed.rows import Rows

    device, began = "cpu" if dry else "cuda", time.time()
    rows = Rows(device, results)
    session = Session(device, rows, more, kept, dry, float(os.environ["ANYSTATE_WINDOW_END"]))
    try:
        PARTS[name].run(session)
    except KeyboardInterrupt:
        print(f"{name}: stopped at its limit; what was measured is kept", flush=True)
        return 130
    except Unfinished as error:
        print(f"{name}: {error}", flush=True)
        return UNFINISHED
    except Exception as error:  # whatever a compiler or driver raises: the next part still runs
        traceback.print_exc()
        print(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
        return 1
    rows.add(f"part {name}", {"window": time.time() - began}, "s", False)
    return 0


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench/gpu/window.sh", description="What is measured on a GPU; see docs/gpu.md.")
    parser.add_argument("call", type=int, nargs="?", choices=sorted(CALLS), help="which of the three calls")
    parser.add_argument("--dry-run", action="store_true", help="every part at tiny sizes, without a GPU")
    parser.add_argument("--only", help="parts by name, separated by commas, instead of the call's; also fp8, emoji")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    for name in ("results", "more", "kept"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part ends with its window
    if a.part:
        return run_part(a.part, a.dry_run, a.results, a.more, a.kept)
    if a.call is None:
        parser.error("which call: 1, 2 or 3")
    kept = Path(os.environ.get("ANYSTATE_GPU_FOLDER", ROOT / ".gpu"))
    out = Path(os.environ.get("OUT") or (kept / "dry-run" if a.dry_run else ROOT / "bench/results")).absolute()
    try:
        return run(a.call, a.dry_run, a.only.split(",") if a.only else None, out, kept.absolute())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
