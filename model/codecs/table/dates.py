"""Dates and times: formats of those that are text or digits, found, read and written; their steps.

A format is one of strftime with three additions: %-d (also m, H, I) has no leading zero, %3f are milliseconds (any
number of digits), %^b and %#b are in upper and lower case (also a, A, B, p).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

UNITS = {"day": "D", "hour": "h", "minute": "m", "second": "s", "ms": "ms", "us": "us", "ns": "ns"}
SIZES = {"day": 86_400_000_000_000, "hour": 3_600_000_000_000, "minute": 60_000_000_000, "second": 1_000_000_000}
SIZES |= {"ms": 1_000_000, "us": 1000, "ns": 1}
MONTHS = {"month": 0, "month end": 1}  # steps of different lengths: days from such a date to a month's first
STEPS = (*MONTHS, *SIZES)
DIGITS = {"%Y": r"\d{4}", "%m": r"\d{1,2}", "%d": r"\d{1,2}", "%H": r"\d{1,2}", "%I": r"\d{1,2}", "%M": r"\d{2}",
          "%S": r"\d{2}", "%y": r"\d{2}", "%b": "[A-Za-z]{3}", "%B": "[A-Za-z]+", "%a": "[A-Za-z]{3}",
          "%A": "[A-Za-z]+", "%p": "[AaPp][Mm]", "%f": r"\d{1,9}", "%z": r"(?:Z|[+-]\d{2}:?\d{2})"}  # fmt: skip
DIRECTIVE = re.compile(r"%[-^#]?\d?([A-Za-z])")
NAMES = {"%b": "jan feb mar apr may jun jul aug sep oct nov dec", "%a": "mon tue wed thu fri sat sun",
         "%B": "january february march april may june july august september october november december",
         "%A": "monday tuesday wednesday thursday friday saturday sunday"}  # fmt: skip
WORDS = re.compile(r"[A-Za-z]+|\d+|[^A-Za-z\d]+")
TIME = re.compile(
    r"(?P<hour>\d{1,2}):\d{2}(?P<second>:\d{2}(?P<fraction>[.,]\d{1,9})?)?(?P<half> ?[AaPp][Mm])?"
    r"(?P<zone> ?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}))?"
)
NUMERIC = re.compile(r"(\d{4}|\d{1,2})([-/. ])(\d{1,2})\2(\d{4}|\d{1,2})")
COMPACT = {8: "%Y%m%d", 14: "%Y%m%d%H%M%S", 12: "%Y%m%d%H%M", 6: "%Y%m"}
SEPARATOR = re.compile(r"T| +|, *|_")
TRIED = 8  # cells whose spelling is tried on all others
PLAUSIBLE = (1900, 2100)  # years of digits that are taken for dates


@dataclass
class FoundFormat:
    """How a column spells dates.

    Attributes:
        zone: the offset from UTC in which dates are written, where cells have several.
        wrong: the texts that are no such dates.
        assumed: what was assumed, None if nothing.
    """

    format: str
    zone: str | None
    wrong: list[str]
    assumed: list[str] = field(default_factory=list)


def find_format(counts: dict[str, int], given: str | None = None) -> FoundFormat | None:
    """The format of texts {text: number of cells}, None if most of them are no dates; a given format is kept."""
    texts = list(counts)
    if given is not None:
        read = read_texts(texts, given)
        return FoundFormat(given, None, [text for text, value in zip(texts, read, strict=True) if np.isnat(value)])
    tried = [text for text in texts if any(c.isdigit() for c in text)][:TRIED]
    formats = list(dict.fromkeys(form for text in tried for form in _candidates(text)))
    sample = texts[:: max(len(texts) // 200, 1)]
    valid = {form: int((~np.isnat(read_texts(sample, form))).sum()) for form in formats}
    formats = [form for form in formats if valid[form] >= max(0.5 * len(sample), 0.95 * max(valid.values()))]
    if not formats:
        return None
    scores = {form: _score(counts, form) if len(formats) > 1 else 1 for form in formats}
    best = [form for form in formats if scores[form] == max(scores.values())]
    return _described(_first(best, texts), best, counts)


def _score(counts: dict[str, int], form: str) -> int:
    """The number of cells that are dates of this format."""
    read = read_texts(list(counts), form)
    return int(np.array(list(counts.values()))[~np.isnat(read)].sum())


def _described(form: str, best: list[str], counts: dict[str, int]) -> FoundFormat:
    """The format in the spelling of the texts, and what was assumed."""
    texts = list(counts)
    found = FoundFormat(_spelled(form, texts), None, [])
    read = read_texts(texts[:200], form)
    other = next((f for f in best if not np.array_equal(read_texts(texts[:200], f), read, equal_nan=True)), None)
    if other is not None:
        found.assumed.append(f"no cell tells {plain(form)} from {plain(other)}: the first is assumed")
    if "%y" in form:
        found.assumed.append("years of two digits are taken for 1969 to 2068")
    if "%z" in form:
        zones = _zones(texts, counts)
        first = max(zones, key=lambda zone: zones[zone])
        if len(zones) > 1:
            found.zone = first
            found.assumed.append(f"{len(zones)} offsets from UTC: all are written with {first}")
        else:
            found.format = found.format.replace("%z", first)
    read = read_texts(texts, found.format, found.zone)
    wrong = np.isnat(read)
    found.wrong = [texts[i] for i in np.flatnonzero(wrong)]
    written = iter(write_texts(read[~wrong], found.format, found.zone))
    differing = [text for text, bad in zip(texts, wrong.tolist(), strict=True) if not bad and text != next(written)]
    if differing and len(found.assumed) == 0 and found.zone is None:
        found.assumed.append(f"spelled in several ways, such as {differing[0]!r}: all are written as {found.format}")
    return found


def _candidates(text: str) -> list[str]:
    """Formats that a text may have."""
    text = text.strip()
    time = TIME.search(text)
    if time is not None and time.end() == len(text):
        date, tail = text[: time.start()], _time_format(time)
        if not date:
            return [tail]
        separator = re.search(rf"(?:{SEPARATOR.pattern})$", date)
        if separator is None:
            return []
        return [form + separator.group() + tail for form in _date_formats(date[: separator.start()])]
    compact = re.fullmatch(r"(\d{8})T(\d{6}|\d{4})(Z?)", text)
    if compact is not None:
        return [f"%Y%m%dT%H%M{'%S' if len(compact[2]) == 6 else ''}{compact[3]}"]
    return _date_formats(text)


def _time_format(time: re.Match) -> str:
    form = ("%I" if time["half"] else "%H") + ":%M"
    if time["second"]:
        form += ":%S"
    if time["fraction"]:
        form += f"{time['fraction'][0]}%{len(time['fraction']) - 1}f"
    if time["half"]:
        form += (" " if time["half"][0] == " " else "") + "%p"
    if time["zone"]:
        zone = time["zone"]
        form += (" " if zone[0] == " " else "") + (zone.strip() if zone.strip() in ("UTC", "GMT") else "%z")
    return form


def _date_formats(text: str) -> list[str]:
    numeric = NUMERIC.fullmatch(text)
    if numeric is not None:
        first, s, _, last = numeric.groups()
        if len(first) == 4:
            return [f"%Y{s}%m{s}%d"]
        year = "%Y" if len(last) == 4 else "%y"
        return [f"%d{s}%m{s}{year}", f"%m{s}%d{s}{year}"] + ([f"%y{s}%m{s}%d"] if year == "%y" else [])
    if text.isdigit():
        return [COMPACT[len(text)]] if len(text) in COMPACT else []
    month = re.fullmatch(r"(\d{4})([-/.])\d{1,2}|\d{1,2}([-/.])(\d{4})", text)
    if month is not None:
        return [f"%Y{month[2]}%m" if month[1] else f"%m{month[3]}%Y"]
    return _named_formats(text)


def _named_formats(text: str) -> list[str]:
    """Formats of a date with the name of its month."""
    forms, has_month, has_day, has_year = [""], False, False, False
    for part in WORDS.findall(text):
        low = part.lower()
        names = [directive for directive, known in NAMES.items() if low in known.split()]
        if names:
            has_month |= "%b" in names or "%B" in names
            flag = "^" if part.isupper() and len(part) > 1 else "#" if part.islower() else ""
            options = [directive.replace("%", "%" + flag) for directive in names]
        elif part.isdigit() and len(part) == 4 and not has_year:
            options, has_year = ["%Y"], True
        elif part.isdigit() and len(part) <= 2:
            if has_day or ("-" not in text and not any(c in text for c in "0123456789")):
                options, has_year = ["%y"], True
            else:
                options, has_day = ["%d"], True
        elif part.isalpha() or part.isdigit():
            return []
        else:
            options = [part.replace("%", "%%")]
        forms = [form + option for form in forms for option in options]
    if has_month and has_day and not has_year and text[-1:].isdigit() and not text[:1].isdigit():
        forms, has_year = [form.replace("%d", "%y") for form in forms], True  # Jan-20
    return forms if has_month and has_year else []


def _first(best: list[str], texts: list[str]) -> str:
    """Of the formats that fit equally, the likelier: of years that span much less time, or with the month first where
    slashes have single digits or AM and PM, or else with the day first."""
    american = [form for form in best if form.startswith("%m/%d")]
    if american and ("%p" in american[0] or any(re.match(r"\d/|\d\d/\d/", text.strip()) for text in texts)):
        return american[0]
    if len(best) == 1 or "%y" not in best[0]:
        return best[0]
    spans = {form: np.ptp(read[~np.isnat(read)]) for form in best for read in [read_texts(texts, form)]}
    short = min(best, key=lambda form: spans[form])
    return short if spans[short] * 5 < spans[best[0]] else best[0]


def plain(form: str) -> str:
    """A format as people write it: DD/MM/YYYY."""
    letters = {"Y": "YYYY", "y": "YY", "m": "MM", "d": "DD", "H": "hh", "I": "hh", "M": "mm", "S": "ss", "b": "Jan",
               "B": "January", "a": "Mon", "A": "Monday", "p": "AM", "z": "+00:00", "f": "f"}  # fmt: skip
    return DIRECTIVE.sub(lambda m: letters.get(m[1], m[0][1:]) * (int(m[0][1:-1] or 6) if m[1] == "f" else 1), form)


def _pattern(form: str, groups: bool = False) -> re.Pattern:
    """A regular expression for texts of a format, blanks around them allowed."""
    out, last = [r"\s*"], 0
    for match in DIRECTIVE.finditer(form):
        body = DIGITS.get("%" + match[1], ".+")
        out += [re.escape(form[last : match.start()]), f"(?P<{match[1]}>{body})" if groups else f"(?:{body})"]
        last = match.end()
    return re.compile("".join(out) + re.escape(form[last:]) + r"\s*")


def _spelled(form: str, texts: Iterable[str]) -> str:
    """The format with the padding and the case of letters that most texts have."""
    try:
        pattern = _pattern(form, groups=True)
    except re.error:  # a directive occurs twice
        return form
    matches = [match for match in map(pattern.fullmatch, texts) if match is not None]
    if re.search(r"%[YmdH]%[mdHM]", form):
        return form  # digits without separators
    for letter in "mdHI":
        if f"%{letter}" in form:
            cells = [match[letter] for match in matches]
            single, padded = sum(len(c) == 1 for c in cells), sum(c[0] == "0" for c in cells)
            if single > padded:
                form = form.replace(f"%{letter}", f"%-{letter}")
    if "%p" in form and sum(match["p"].islower() for match in matches) > len(matches) / 2:
        form = form.replace("%p", "%#p")
    fraction = re.search(r"%\d?f", form)
    if fraction is not None:
        form = form.replace(fraction.group(), f"%{max((len(match['f']) for match in matches), default=6)}f")
    return form


def _zones(texts: list[str], counts: dict[str, int]) -> dict[str, int]:
    zones: dict[str, int] = {}
    for text in texts:
        match = re.search(r"(?:Z|[+-]\d{2}:?\d{2})\s*$", text)
        if match is not None:
            zones[match.group().strip()] = zones.get(match.group().strip(), 0) + counts[text]
    return zones


def read_texts(texts: list[str], form: str, zone: str | None = None) -> np.ndarray:
    """datetime64 of texts, NaT where one is no such date; ISO spellings are read in any column.

    Dates that datetime64[ns] does not hold are read too, unless the format has more than 6 digits of a second.
    """
    unit = "ns" if re.search(r"%[789]f", form) else "us"
    strict = DIRECTIVE.sub(lambda m: "%" + m[1], form)
    series = pd.Series([text.strip() for text in texts], dtype=object)
    if not len(series):
        return np.empty(0, dtype=f"datetime64[{unit}]")
    read = pd.to_datetime(series, format=strict, errors="coerce", utc="%z" in strict)
    out = _naive(read, zone if "%z" in strict else None, unit)
    for i in np.flatnonzero(np.isnat(out)):
        out[i] = _read_one(series[i], strict, unit)
    return out


def _read_one(text: str, strict: str, unit: str) -> np.datetime64:
    """One date beyond the range of pandas, or in ISO's spelling."""
    nothing = np.datetime64("NaT", unit)
    if not text[:1].isdigit() and "%" not in strict[:1]:
        return nothing
    for read in (lambda: datetime.datetime.strptime(text, strict), lambda: datetime.datetime.fromisoformat(text)):
        try:
            value = read()
        except ValueError:
            continue
        if "%Y" not in strict and "%y" not in strict and value.year != 1900:
            return nothing
        return np.datetime64(value.replace(tzinfo=None), unit)
    return nothing


def _naive(values: pd.Series, zone: str | None, unit: str) -> np.ndarray:
    """datetime64 of wall times in a zone (None: UTC for aware dates)."""
    if getattr(values.dtype, "tz", None) is not None:
        values = values.dt.tz_convert(zone if zone not in (None, "Z") else "UTC").dt.tz_localize(None)
    return values.to_numpy().astype(f"datetime64[{unit}]")


def write_texts(dates: np.ndarray, form: str, zone: str | None = None) -> list[str]:
    """Texts of datetime64 (none NaT) in a format."""
    out = np.full(len(dates), "", dtype=object)
    last = 0
    years = dates.astype("datetime64[Y]").astype(np.int64) + 1970
    for match in [*DIRECTIVE.finditer(form), None]:
        end = len(form) if match is None else match.start()
        out = out + form[last:end].replace("%%", "%")
        if match is not None:
            out = out + np.array(_part(dates, years, match.group(), zone), dtype=object)
            last = match.end()
    return out.tolist()


def _part(dates: np.ndarray, years: np.ndarray, directive: str, zone: str | None) -> list[str]:
    """The texts of one directive."""
    flag, letter = directive[1:-1], directive[-1]
    months = dates.astype("datetime64[M]")
    days = dates.astype("datetime64[D]")
    seconds = (dates - days).astype("timedelta64[s]").astype(np.int64)
    if letter == "f":
        ns = (dates - dates.astype("datetime64[s]")).astype("timedelta64[ns]").astype(np.int64)
        return [f"{v:09d}"[: int(flag or 6)] for v in ns.tolist()]
    if letter == "z":
        return [zone or "+00:00"] * len(dates)
    if letter in "bBaA":
        index = months.astype(np.int64) % 12 if letter in "bB" else (days.astype(np.int64) + 3) % 7
        names = [name.capitalize() for name in NAMES["%" + letter].split()]
        texts = [names[i] for i in index.tolist()]
    elif letter == "p":
        texts = ["AM" if s < 43_200 else "PM" for s in seconds.tolist()]
    else:
        numbers = {
            "Y": lambda: years,
            "y": lambda: years % 100,
            "m": lambda: months.astype(np.int64) % 12 + 1,
            "d": lambda: (days - months.astype("datetime64[D]")).astype(np.int64) + 1,
            "H": lambda: seconds // 3600,
            "I": lambda: (seconds // 3600 + 11) % 12 + 1,
            "M": lambda: seconds // 60 % 60,
            "S": lambda: seconds % 60,
        }
        if letter not in numbers:
            return pd.Series(dates).dt.strftime("%" + letter).tolist()
        width = 1 if flag == "-" else 4 if letter == "Y" else 2
        return [f"{v:0{width}d}" for v in numbers[letter]().tolist()]
    return [t.upper() if flag == "^" else t.lower() if flag == "#" else t for t in texts]
