"""The kinds of text columns: dates and numbers in any spelling, yes and no, keys, words; and digits that are dates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from .dates import PLAUSIBLE, find_format, plain, read_texts
from .spelling import find_spelling
from .steps import date_steps, grid_of_decimals, grid_of_integers

IDENTIFIER_ROWS = 20  # rows from which on "all different" means an identifier
BOOLEANS = [{"true", "false"}, {"yes", "no"}, {"t", "f"}, {"y", "n"}, {"on", "off"}]
WORDS_OF_GAPS = (
    "na n/a n.a. #n/a #na <na> null (null) nil none nan nat - -- --- – — ? ?? . .. … missing unknown "
    "#value! #div/0! #ref! #null! #name? #num!"
)
GAP_WORDS = frozenset(WORDS_OF_GAPS.split()) | {""}
TYPO_SHARE, TYPOS = 0.01, 10  # cells among numbers or dates that are none, at most, and different ones of them
DATE_NAMES = re.compile(r"date|day|dob|birth|month|ymd|ym\b|yyyymm|period|time|(^|_)(dt|at|on)$", re.IGNORECASE)
CLOCK_NAMES = re.compile(r"time|hhmm|hour|clock|(^|_)(dep|arr|start|end)", re.IGNORECASE)
DATE_DIGITS = {8: "%Y%m%d", 14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M", 6: "%Y%m"}
CODE_DIGITS = 7  # texts of so many digits each, or more, are codes
HARDLY = 0.9  # share of different cells from which on text hardly repeats
Fields = dict[str, Any]


def is_gap(text: str) -> bool:
    """Whether a text among numbers or dates means a missing cell."""
    return text.strip().lower() in GAP_WORDS


def kind_of_text(name: str | int, counts: dict[str, int], found: Fields, kind: str | None) -> str:
    """The kind of text: dates and numbers in any spelling, yes and no, keys, or words."""
    cells = sum(counts.values())
    core = {text: n for text, n in counts.items() if not is_gap(text)}
    gaps = Counter({text: n for text, n in counts.items() if is_gap(text)})
    if core:
        dates = None if kind in ("continuous", "integer") else _dates_in_text(name, core, found, kind)
        if dates is not None:
            note_gaps(gaps, cells, found, "dates")
            return dates
        numbers = None if kind == "datetime" else _numbers_in_text(core, found, kind)
        if numbers is not None:
            note_gaps(gaps, cells, found, "numbers")
            return numbers
    if gaps and len(core) == sum(core.values()) >= IDENTIFIER_ROWS:
        note_gaps(gaps, cells, found, "keys")
        return kind_of_words(found, core)
    return kind_of_words(found, counts)


def kind_of_words(found: Fields, counts: dict[Any, int]) -> str:
    """The kind of text that is no number and no date, and of numbers that are too long."""
    cells = sum(counts.values())
    if len(counts) <= 3 and {str(text).lower() for text in counts} in BOOLEANS:
        found["reason"] = "two answers: " + ", ".join(map(repr, list(counts)[:2]))
        return "boolean"
    if len(counts) == cells >= IDENTIFIER_ROWS:
        return _identifier(found, list(counts))
    found["reason"] = f"text, {len(counts):,} different values"
    if len(counts) > HARDLY * cells and cells >= 5 * IDENTIFIER_ROWS:
        warn(
            found,
            f"{len(counts):,} of {cells:,} cells differ, and new rows copy them: kind: identifier in the schema makes "
            "up new ones",
        )
    return "categorical"


def _identifier(found: Fields, texts: list) -> str:
    found["reason"] = f"all {len(texts):,} cells differ: new ones are made up, not modelled"
    if sum(str(text).strip().count(" ") > 1 for text in texts) > len(texts) / 2:
        found["warning"] = (
            "is free text that never repeats: it is not modelled, new rows get made-up identifiers; kind: categorical "
            "would copy training cells"
        )
    return "identifier"


def _few(wrong: Iterable[str], counts: dict[str, int]) -> bool:
    """Whether cells that are no numbers or dates are so few that they are typing errors."""
    wrong = list(wrong)
    return len(wrong) <= TYPOS and sum(counts[t] for t in wrong) <= TYPO_SHARE * sum(counts.values())


def warn(found: Fields, text: str) -> None:
    found["warning"] = f"{found['warning']}; {text}" if found.get("warning") else text


def _note_typos(wrong: list[str], counts: dict[str, int], found: Fields, what: str) -> None:
    if wrong:
        n = sum(counts[text] for text in wrong)
        found["gaps"] = [*found.get("gaps", []), *wrong]
        found["missing"] = True
        warn(
            found,
            f"{n:,} of {sum(counts.values()):,} cells are no {what}, the first is {wrong[0]!r}: they count as empty; "
            "correct them, or set kind: categorical in the schema",
        )


def _note_mixture(read: Any, counts: dict[str, int], found: Fields, what: str) -> None:
    """Warn of text of which more than half could be read, but too little."""
    cells, wrong = sum(counts.values()), 0 if read is None else sum(counts[text] for text in read.wrong)
    if read is not None and wrong < cells / 2:
        warn(
            found,
            f"{cells - wrong:,} of {cells:,} cells are {what}, the first other is {read.wrong[0]!r}: all stay text; "
            "correct them, or name them as missing (--missing)",
        )


def note_gaps(gaps: Counter[str], cells: int, found: Fields, what: str) -> None:
    if gaps:
        shown = ", ".join(repr(str(word)) for word, _ in gaps.most_common(3))
        found["gaps"] = [*found.get("gaps", []), *gaps]
        found["missing"] = True
        warn(found, f"{gaps.total():,} of {cells:,} cells are {shown} among {what}: they count as empty")


def _dates_in_text(name: str | int, counts: dict[str, int], found: Fields, kind: str | None) -> str | None:
    """`datetime` if texts are dates, else None."""
    are_digits = all(text.strip().isdigit() for text in counts)
    if are_digits and kind != "datetime":
        form = digits_format(name, np.array([int(t) for t in counts]), {len(t.strip()) for t in counts})
        if form is None or form == "%H%M":
            return None
    dates = find_format(counts, found.get("format"))
    if dates is None or not (_few(dates.wrong, counts) or kind == "datetime"):
        _note_mixture(dates, counts, found, "dates")
        return None
    example = next(text for text in counts if text not in dates.wrong)
    found |= {"format": dates.format, "zone": dates.zone} if dates.zone else {"format": dates.format}
    for text in dates.assumed:
        warn(found, text)
    if dates.assumed:
        warn(found, "format in the schema sets another")
    if are_digits and kind is None:
        warn(found, f"digits such as {example!r} are taken for dates; kind: integer in the schema for plain numbers")
    if _few(dates.wrong, counts):
        _note_typos(dates.wrong, counts, found, "dates")
    read = read_texts([t for t in counts if t not in dates.wrong], dates.format, dates.zone)
    found["reason"] = f"text such as {example!r} is read as {plain(dates.format)}"
    found |= date_steps(read[~np.isnat(read)])
    return "datetime"


def _numbers_in_text(counts: dict[str, int], found: Fields, kind: str | None) -> str | None:
    """`integer` or `continuous` if texts are numbers in a spelling, else None."""
    numbers = find_spelling(counts, found.get("spelling"))
    if numbers is None or not (_few(numbers.wrong, counts) or kind in ("continuous", "integer", "numerical")):
        _note_mixture(numbers, counts, found, "numbers")
        return None
    lengths = {len(text) for text in counts}
    is_digits = all(text.isdigit() for text in counts)
    if kind is None and is_digits and len(lengths) == 1 and lengths.pop() >= CODE_DIGITS:
        return None
    if _few(numbers.wrong, counts):
        _note_typos(numbers.wrong, counts, found, "numbers")
    if numbers.assumed:
        warn(found, numbers.assumed + "; spelling in the schema sets another")
    wrong = set(numbers.wrong)
    read = [numbers.spelling.read(text) for text in counts if text not in wrong]
    found["spelling"] = numbers.spelling
    example = next(text for text in counts if text not in wrong)
    if numbers.decimals == 0:
        found["reason"] = f"whole numbers written like {example!r}"
        found |= grid_of_integers(np.array(sorted({int(v) for v in read if v is not None}), dtype=object))
        return "integer"
    values = np.unique(np.array(read, dtype=np.float64))
    found["reason"], found["decimals"] = f"numbers written like {example!r}", numbers.decimals
    if numbers.decimals is not None:
        found |= grid_of_decimals(values[np.isfinite(values)], numbers.decimals)
    return "continuous"


def digits_format(name: str | int, unique: np.ndarray, lengths: set[int]) -> str | None:
    """The format of dates or clock times that distinct integers spell, None if they are plain numbers.

    All of them must be valid dates of 1900 to 2100. Numbers drawn at random would be with probability 0.037 each for
    YYYYMMDD, 0.12 for YYYYMM and 0.6 for hhmm. This must be improbable: 3 different values, 10, and 50 with more than
    20 different minutes over 6 hours; where the name tells, 1 value, 1 and 20 values.
    """
    low, high = int(unique[0] if len(unique) else -1), int(unique.max() if len(unique) else -1)
    if low < 0:
        return None
    form = DATE_DIGITS.get(next(iter(lengths))) if len(lengths) == 1 else None
    is_named = DATE_NAMES.search(str(name)) is not None
    if form is not None and len(unique) >= (1 if is_named else 10 if form == "%Y%m" else 3):
        year = 10 ** (len(str(low)) - 4)
        is_plausible = PLAUSIBLE[0] <= low // year and high // year <= PLAUSIBLE[1]
        if is_plausible and not np.isnat(read_texts([str(int(v)) for v in unique], form)).any():
            return form
    is_clock = CLOCK_NAMES.search(str(name)) is not None
    if high < 2400 and len(unique) >= (20 if is_clock else 50) and bool((unique % 100 < 60).all()):
        minutes, hours = len(set((unique % 100).tolist())), len(set((unique // 100).tolist()))
        if hours >= 6 and (minutes > 20 or is_clock):
            return "%H%M"
    return None
