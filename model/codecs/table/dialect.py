"""How a text file writes a table: separator, decimal mark and encoding, given or guessed where that is safe."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence

from .text_encoding import BOM, encoding_name

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars (|)"}
SAMPLE = 200_000  # characters that separators are counted in
DECIMAL = {mark: re.compile(rf"\s*-?\d*{re.escape(mark)}\d+([eE][+-]?\d+)?\s*") for mark in ".,"}
WHOLE = re.compile(r"\s*-?\d+\s*")
MAYBE_THOUSANDS = re.compile(r"\s*-?[1-9]\d{0,2}[.,]\d{3}\s*")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The spelling of a text file.

    Args:
        spaces: a space follows every separator and is not part of the cell.
        prefix: what stands before the header: a byte order mark, Excel's line sep=;
    """

    sep: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    prefix: str = ""
    spaces: bool = False

    def to_bytes(self, text: str, where: str) -> bytes:
        """The bytes of a text.

        Raises:
            ValueError: the encoding lacks a character.
        """
        try:
            return (self.prefix + text).encode(self.encoding)
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            raise ValueError(f"{where}: {character!r} cannot be written in {self.encoding}") from None

    @property
    def settings(self) -> dict[str, str]:
        """What differs from commas, points and UTF-8, as settings of a config."""
        usual = Dialect()
        name = encoding_name(self.encoding, self.prefix.startswith(BOM))
        own = {"sep": self.sep, "encoding": name, "decimal": self.decimal}
        return {key: value for key, value in own.items() if value != getattr(usual, key)}

    @classmethod
    def of(cls, sep: str | None = None, encoding: str | None = None, decimal: str | None = None) -> Dialect:
        """The dialect of settings, for writing."""
        encoding = encoding or "utf-8"
        marked = encoding in ("utf-8-sig", "utf-16", "utf-32")
        plain = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
        return cls(sep or ",", decimal or ".", plain, BOM if marked else "")


def separator(text: str) -> str:
    """The separator that a user names: one character, or "tab" or "\\t".

    Raises:
        ValueError: something else.
    """
    sep = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(sep) != 1 or sep in '"\r\n':
        raise ValueError(f"--sep {text!r}: give one character, or tab")
    return sep


def decimal_mark(text: str) -> str:
    """The decimal mark that a user names.

    Raises:
        ValueError: it is neither a point nor a comma.
    """
    if text not in DECIMAL:
        raise ValueError(f"--decimal {text!r}: give . or ,")
    return text


def guess_separator(text: str, where: str, prefer_tab: bool = False, usual: str | None = None) -> tuple[str, bool]:
    """(the separator that gives every row as many fields as the header, whether a space follows each of them).

    If none does, the one that fits most rows, so that the first other row can be named.

    Args:
        prefer_tab: the name says that it is a tab.
        usual: of other files of this kind, where several fit.

    Raises:
        ValueError: several fit; the user has to choose.
    """
    sample = text[:SAMPLE]
    fitting, scores = [], {}
    for sep in SEPARATORS:
        counts = _field_counts(sample, sep, len(text) > SAMPLE)
        scores[sep] = (sum(n == counts[0] for n in counts) if counts and counts[0] > 1 else 0, sep == ",")
        if counts and counts[0] > 1 and len(set(counts)) == 1:
            fitting.append(sep)
    preferred = "\t" if prefer_tab else usual
    if preferred in fitting:
        fitting = [preferred]
    if len(fitting) > 1:
        names = " or ".join(SEPARATORS[sep] for sep in fitting)
        raise ValueError(f"{where}: its cells could be separated by {names}; give --sep")
    best = max(scores, key=lambda sep: scores[sep])
    sep = fitting[0] if fitting else best if scores[best][0] or usual is None else usual
    return sep, bool(fitting) and follows_space(sample, sep)


def _field_counts(sample: str, sep: str, is_part: bool) -> list[int]:
    """The number of fields of every row; [] if the quotes do not fit the separator."""
    rows = []
    try:
        reader = csv.reader(io.StringIO(sample, newline=""), delimiter=sep, strict=True, skipinitialspace=sep != "\t")
        rows = [len(row) for row in reader if row]
    except csv.Error:
        return rows[:-1] if is_part and len(rows) > 2 else []
    return rows[:-1] if is_part else rows


def follows_space(sample: str, sep: str) -> bool:
    """Whether a space follows every separator outside quotes that has a cell after it."""
    if sep.isspace():
        return False
    cells = (cell for parts in records(sample, sep) for cell in parts[2::2] if cell)
    first = next(cells, "")
    return first.startswith(" ") and all(cell.startswith(" ") for cell in cells)


def records(text: str, sep: str = ",") -> Iterator[list[str]]:
    """The records of a text as lists of field, separator, field, …, line end, which joined give the text again."""
    mark = re.escape(sep)
    blank = "" if sep == " " else " *"
    parts: list[str] = []
    pattern = rf'(?P<field>{blank}"(?:[^"]|"")*"|[^{mark}\r\n]*)(?P<end>{mark}|\r\n|\n|\r|\Z)'
    for match in re.finditer(pattern, text):
        parts += [match["field"], match["end"]]
        if match["end"] != sep:
            yield parts
            parts = []
            if match.end() == len(text):
                return


def guess_decimal(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    sep: str,
    where: str,
    gaps: set[str],
    usual: str | None = None,
) -> str:
    """The decimal mark of a table's columns; where commas separate the cells it is a point.

    "0,5" and "12,75" can only be decimals. "1,250" could also be a thousand, and decides nothing; neither does "1.250"
    between semicolons, which are used where the decimal mark is a comma.

    Args:
        gaps: texts that mean a missing cell.
        usual: of other files of this kind, where this one leaves the choice open.

    Raises:
        ValueError: columns with points and columns with commas, or only numbers that could be either.
    """
    if sep == "," and usual != ",":
        return "."
    certain: dict[str, tuple[str, str]] = {}
    doubtful: tuple[str, str] | None = None
    for name, cells in zip(header, zip(*body, strict=True), strict=False):
        distinct = {cell for cell in cells if cell.strip() not in gaps}
        for mark, pattern in DECIMAL.items():
            marked = [cell for cell in distinct if mark in cell]
            if not marked or not all(pattern.fullmatch(c) or WHOLE.fullmatch(c) for c in distinct):
                continue
            clear = next((cell for cell in sorted(marked) if not MAYBE_THOUSANDS.fullmatch(cell)), None)
            if clear is not None:
                certain.setdefault(mark, (name, clear))
            elif mark == "," or sep == ";":
                doubtful = doubtful or (name, min(marked))
    if usual is not None and (len(certain) == 2 or (not certain and doubtful is not None)):
        return usual
    if len(certain) == 2:
        (a, x), (b, y) = certain["."], certain[","]
        raise ValueError(f"{where}: column {a!r} has {x.strip()}, column {b!r} has {y.strip()}; give --decimal . or ,")
    if not certain and doubtful is not None:
        name, cell = doubtful
        raise ValueError(f"{where}: {cell.strip()} in column {name!r} could be a decimal or a thousand; "
                         "give --decimal , or --decimal .")  # fmt: skip
    return next(iter(certain), usual or ".")
