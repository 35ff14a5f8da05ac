"""Measured values: what is stored beside each, and how they are written.

Every `anystate bench` command takes `--json F` and writes a list of results there after each measurement, so that an
interrupted run keeps what it measured. A result holds what was measured, of which implementation (`engine`: "fast" is
ours, "plain" the reference), the value with its unit, the ratio to the reference, and its provenance: device, versions,
commit, date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ...model.provenance import provenance
from ...model.storage import atomic_write

PROVENANCE = ("device", "threads", "cores", "load", "versions", "commit", "date")  # keys of `model.provenance`


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured value.

    name: what was measured. ratio_to_plain: how many times better than the reference, None where that was not
    measured. about: further facts about the measurement. provenance: see `model.provenance`.
    """

    name: str
    engine: str
    value: float
    unit: str
    ratio_to_plain: float | None
    about: dict
    provenance: dict

    def __str__(self) -> str:
        ratio = "" if self.ratio_to_plain is None else f"{self.ratio_to_plain:8.2f} × plain"
        return f"{self.name:44} {self.engine:6} {self.value:12.5g} {self.unit:12}{ratio}"

    def to_json(self) -> dict:
        """All values in one flat dictionary, as they are written."""
        values = dataclasses.asdict(self)
        about, where = values.pop("about"), values.pop("provenance")
        return {**values, **about, **where}

    @classmethod
    def from_json(cls, values: dict) -> Result:
        """The result that `to_json` wrote."""
        own = [field.name for field in dataclasses.fields(cls)][:5]
        where = {name: values[name] for name in PROVENANCE if name in values}
        about = {name: values[name] for name in values if name not in PROVENANCE and name not in own}
        return cls(**{name: values[name] for name in own}, about=about, provenance=where)


class ResultLog:
    """Collects results, prints each and writes all to a file.

    A file whose name ends in .jsonl holds one line per result, written to disk at once; if a result is written again,
    the last line with its name and `engine` counts. Several processes may append to it one after the other: results in
    the file that were measured on this device at this commit are part of the log. Any other file holds one JSON list.
    """

    def __init__(
        self, device: torch.device | str, file: Path | str | None = None, write: Callable[[str], None] = print
    ):
        self.provenance, self.file, self.write = provenance(device), file and Path(file), write
        self.append = self.file is not None and self.file.suffix == ".jsonl"
        earlier = read_results(self.file) if self.append else []
        self.results = [result for result in earlier if self._is_from_here(result)]

    def add(self, name: str, values: dict[str, float], unit: str, more_is_better: bool = True, **about) -> None:
        """Add one result per implementation.

        They may be added one after the other under the same name: once the reference is there, the others get their
        ratio.

        Args:
            values: {engine: value}.
            about: further facts to store with the results.
        """
        before = {result.engine: result for result in self.results if result.name == name}
        merged = dict(before)
        for engine, value in values.items():
            merged[engine] = Result(name, engine, value, unit, None, about, self.provenance)
        _set_ratios(merged, more_is_better)
        changed = [result for engine, result in merged.items() if result != before.get(engine)]
        self.results = [result for result in self.results if result.name != name] + list(merged.values())
        for result in changed:
            self.write(str(result))
        self._save(changed)

    def find(self, name: str) -> dict[str, float]:
        """{engine: value} of the results of a name."""
        return {result.engine: result.value for result in self.results if result.name == name}

    def _is_from_here(self, result: Result) -> bool:
        return all(result.provenance.get(key) == self.provenance[key] for key in ("device", "commit"))

    def _save(self, changed: list[Result]) -> None:
        if self.append:
            append_results(self.file, changed)
        elif self.file:
            atomic_write(self.file, json.dumps([result.to_json() for result in self.results], indent=1) + "\n")


def _set_ratios(results: dict[str, Result], more_is_better: bool) -> None:
    """Set the ratio to the reference in {engine: result}, where both values are present and not zero."""
    plain = results.get("plain")
    if plain is None or not plain.value:
        return
    for engine, result in results.items():
        if engine != "plain" and result.value:
            ratio = result.value / plain.value if more_is_better else plain.value / result.value
            results[engine] = dataclasses.replace(result, ratio_to_plain=ratio)


def append_results(file: Path, results: list[Result]) -> None:
    """Append one line per result to a .jsonl file and sync it to disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.is_file() and file.read_bytes()[-1:] not in (b"\n", b"")  # the last write was interrupted
    with file.open("a", encoding="utf-8") as out:
        out.write("\n" * cut + "".join(json.dumps(result.to_json()) + "\n" for result in results))
        out.flush()
        os.fsync(out.fileno())


def read_results(file: Path) -> list[Result]:
    """The results of a .jsonl file, the last of every name and `engine`; incomplete lines are skipped."""
    found: dict[tuple[str, str], Result] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            result = Result.from_json(json.loads(line))
            found.pop((result.name, result.engine), None)
            found[result.name, result.engine] = result
    return list(found.values())
