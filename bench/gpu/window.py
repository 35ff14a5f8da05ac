"""Measurements on a GPU in three calls of at most ten minutes; `bench/gpu/window.sh 1|2|3` runs this.

A call is a list of parts (`bench.gpu.parts`). Each part is a process with a time limit, and every measurement is
appended to one file at once, so that a time limit loses only the rest. A part that ended well is not measured again at
the same commit on the same kind of GPU: the same command continues an interrupted call, and a new machine continues
with the files that an earlier one left in bench/results.
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
from typing import TextIO

from .parts import CALLS, PARTS
from .quality_parts import PAPER_RUN
from .session import ROOT, Part, Session, Unfinished

SECONDS = 555  # of a call
RESERVE = 8  # no part starts with fewer seconds left
GRACE = 3  # seconds between the interruption of a part and its kill
UNFINISHED = 3  # exit code of a part that continues with the next call


class Window:
    """One call: runs its parts and collects their results.

    Args:
        call: 1, 2 or 3. dry: a trial of all parts at tiny sizes without a GPU.
        only: names of parts to run instead of the call's.
        out: folder of the results. workdir: folder of what stays on the machine between calls.

    Raises:
        ValueError: no such part, or no GPU.
    """

    def __init__(self, call: int, dry: bool, only: list[str] | None, out: Path, workdir: Path):
        self.began, self.call, self.dry, self.only = time.time(), call, dry, only
        self.parts = chosen(call, only)
        self.machine = "dry run" if dry else gpu_name()
        slug = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        self.workdir = workdir / "tried" if dry else workdir  # a real call must not continue the runs of a trial
        self.results = out / f"gpu-{slug}.jsonl"
        self.transcript, self.archive = out / f"gpu-{slug}-{call}.txt", out / f"gpu-{slug}-{call}.tar.gz"
        self.files = self.workdir / f"more-{slug}-{call}"
        self.lost: list[str] = []
        self.unfinished: list[str] = []

    def run(self) -> int:
        """Run the parts that are not measured; returns an exit code, 1 if one failed or ran out of time."""
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        if self.dry:
            shutil.rmtree(self.workdir, ignore_errors=True)
            self.results.unlink(missing_ok=True)
        else:
            restore(self.results, self.workdir, self.files)
        measured = set() if self.dry else completed(self.results, self.machine)
        self.files.mkdir(parents=True, exist_ok=True)
        with self.transcript.open("a", encoding="utf-8") as file:
            write = Transcript(file)
            write(f"call {self.call} on {self.machine}: " + ", ".join(f"{p.name} ({p.seconds} s)" for p in self.parts))
            due = 0.0
            for part in self.parts:
                due += SECONDS if self.only else part.seconds
                if part.name in measured:
                    write(f"== {part.name}: measured before at this commit")
                else:
                    self._run_part(part, due, write)
            if any(self.files.rglob("*")):
                pack(self.archive, self.workdir, self.files)
            write(self._summary())
        return int(bool(self.lost))

    def _run_part(self, part: Part, due: float, write: Callable[[str], None]) -> None:
        """Run a part until `due` seconds after the call began; this includes time that earlier parts did not need."""
        spent = time.time() - self.began
        left = SECONDS - spent
        if left < RESERVE:
            write(f"== {part.name}: left out, {SECONDS} s are over")
            self.lost.append(part.name)
            return
        arguments = ["--part", part.name, "--results", self.results, "--files", self.files, "--workdir", self.workdir]
        arguments += ["--dry-run"] if self.dry else []
        code, seconds = run_limited(part, arguments, min(left, due - spent), self.dry, write)
        outcome = {0: "done", UNFINISHED: "continues with the same command"}.get(code, f"exit {code}")
        write(f"== {part.name}: {outcome}, after {seconds:.0f} s")
        if code == UNFINISHED:
            self.unfinished.append(part.name)
        elif code:
            self.lost.append(part.name)
        if self.results.is_file() and not self.dry:
            shutil.copy(self.results, self.workdir / self.results.name)

    def _summary(self) -> str:
        line = f"{time.time() - self.began:.0f} s in all; results in {self.results}"
        if self.unfinished:
            line += f"; to be continued: {', '.join(self.unfinished)}"
        if self.lost:
            line += f"; NOT DONE: {', '.join(self.lost)}"
        return line


class Transcript:
    """Prints lines, and writes them to a file."""

    def __init__(self, file: TextIO):
        self.file = file

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def chosen(call: int, only: list[str] | None) -> list[Part]:
    """The parts of a call, or those named."""
    if only is None:
        return list(CALLS[call])
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise ValueError(f"--only: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return [PARTS[name] for name in only]


def gpu_name() -> str:
    """The GPU as PyTorch names it, read without using any of its memory."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ValueError("no GPU here, and official sizes take hours without one; --dry-run tries every part") from None


def restore(results: Path, workdir: Path, files: Path) -> None:
    """Get the results and files of earlier calls, from this machine or from what another one left in bench/results."""
    for folder in (workdir, ROOT / "bench/results"):
        if not results.is_file() and (folder / results.name).is_file():
            shutil.copy(folder / results.name, results)
    archive = ROOT / "bench/results" / f"{files.name.replace('more-', 'gpu-', 1)}.tar.gz"
    if not files.exists() and archive.is_file():
        with tarfile.open(archive) as opened:
            opened.extractall(workdir, filter="data")


def completed(results: Path, machine: str) -> set[str]:
    """Names of the parts that ended well on such a machine at this commit."""
    from ...model.provenance import provenance
    from ..speed.results import read_results

    here = (machine, provenance("cpu")["commit"])
    names = set()
    for result in read_results(results):
        where = (result.provenance["device"], result.provenance["commit"])
        if result.name.startswith("part ") and where == here:
            names.add(result.name.removeprefix("part "))
    return names


def run_limited(
    part: Part, arguments: list, limit: float, dry: bool, write: Callable[[str], None]
) -> tuple[int, float]:
    """(exit code, seconds) of a part in a process of its own, interrupted at its limit and killed soon after.

    Processes that it leaves behind are killed too: they would keep the output open and run beside the next part.
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
    interrupt = threading.Timer(limit, send_signal, [process, signal.SIGINT])
    kill = threading.Timer(limit + GRACE, send_signal, [process, signal.SIGKILL])
    interrupt.start()
    kill.start()
    threading.Thread(target=kill_leftovers, args=[process], daemon=True).start()
    try:
        for line in process.stdout:
            write(line.rstrip("\n"))
        code = process.wait()
    finally:
        interrupt.cancel()
        kill.cancel()
        send_signal(process, signal.SIGKILL)
    return code, time.time() - began


def send_signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """Signal a process and all that it started, if any of them are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def kill_leftovers(process: subprocess.Popen) -> None:
    """After a process has ended, kill what it started."""
    process.wait()
    time.sleep(2)
    send_signal(process, signal.SIGKILL)


def pack(archive: Path, workdir: Path, files: Path) -> None:
    """Pack the files of a call and, after the third one, the newest checkpoint of the run that continues."""
    checkpoints = sorted((workdir / "runs" / PAPER_RUN).glob("step_*"))[-1:]
    with tarfile.open(archive, "w:gz") as opened:
        for path in [files, *(checkpoints if files.name.endswith("3") else [])]:
            opened.add(path, path.relative_to(workdir))


def run_part(name: str, dry: bool, results: Path, files: Path, workdir: Path) -> int:
    """Run one part in this process; returns its exit code."""
    from ..speed.results import ResultLog

    device, began = "cpu" if dry else "cuda", time.time()
    log = ResultLog(device, results)
    session = Session(device, log, files, workdir, dry, float(os.environ["ANYSTATE_WINDOW_END"]))
    try:
        PARTS[name].run(session)
    except KeyboardInterrupt:
        print(f"{name}: stopped at its time limit; completed measurements are kept", flush=True)
        return 130
    except Unfinished as error:
        print(f"{name}: {error}", flush=True)
        return UNFINISHED
    except Exception as error:  # whatever a compiler or driver raises: the next part still runs
        traceback.print_exc()
        print(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
        return 1
    log.add(f"part {name}", {"window": time.time() - began}, "s", False)
    return 0


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench/gpu/window.sh", description="Measurements on a GPU; see docs/gpu.md.")
    parser.add_argument("call", type=int, nargs="?", choices=sorted(CALLS), help="which of the three calls")
    parser.add_argument("--dry-run", action="store_true", help="every part at tiny sizes, without a GPU")
    parser.add_argument("--only", help="parts by name, separated by commas, instead of the call's; also fp8, emoji")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    for name in ("results", "files", "workdir"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated call kills its part
    if a.part:
        return run_part(a.part, a.dry_run, a.results, a.files, a.workdir)
    if a.call is None:
        parser.error("which call: 1, 2 or 3")
    workdir = Path(os.environ.get("ANYSTATE_GPU_FOLDER", ROOT / ".gpu"))
    default = workdir / "dry-run" if a.dry_run else ROOT / "bench/results"
    out = Path(os.environ.get("OUT") or default).absolute()
    only = a.only.split(",") if a.only else None
    try:
        return Window(a.call, a.dry_run, only, out, workdir.absolute()).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
