"""Numbers written as text: how the cells of a column spell them, read, and written in the same spelling."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal

from pydantic import BaseModel, ConfigDict, Field

MARKS = (("", "."), (",", "."), (".", ","), (" ", ","), ("\u00a0", ","), ("\u202f", ","), (" ", "."), ("'", "."),
         ("’", "."), ("'", ","), ("\u00a0", "."), ("\u202f", "."), ("", ","))  # (thousands, decimal)  # fmt: skip
MINUS = "-−–"
SPACES = " \t\u00a0\u202f"
BODY = re.compile(r"\d[\d.,'’ \u00a0\u202f]*\d|\d|[.,]\d+")
PLAIN = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf(inity)?", re.IGNORECASE)
EXPONENT = re.compile(r"(?:\d+\.?\d*|\.\d+)[eE][+-]?\d+")
CODES = (
    "AED ARS AUD BGN BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HKD HUF IDR ILS INR JPY KES KRW KZT MAD MXN MYR NGN "
    "NOK NZD PEN PHP PKR PLN QAR RON RSD RUB SAR SEK SGD THB TRY TWD UAH USD UYU VND ZAR KR RS FR RM SFR ZŁ KČ FT"
)
CURRENCIES = frozenset(CODES.split())
LONGEST = 18  # digits of a whole number, at most; longer ones are codes
LONGEST_FRACTION = 15  # digits of a number with a fraction, as many as a float holds
PHONE = 7  # digits from which on "+123…" is a telephone number
UNIT = 12  # characters after a number, at most


class Spelling(BaseModel):
    """How the numbers of a text column are written; # in a template stands for the digits."""

    model_config = ConfigDict(extra="forbid")

    positive: str = Field("#", description="template of a number that is not negative, say $#")
    negative: str = Field("-#", description="template of a negative number, say ($#)")
    decimal: str = Field(".", description="decimal mark")
    thousands: str = Field("", description="mark between groups of three digits")
    least: int = Field(0, description="digits after the decimal mark, at least")
    width: int = Field(0, description="cells are filled with spaces from the left to this many characters")

    def read(self, text: str) -> int | float | None:
        """The number that a text spells, with or without what surrounds the digits; None if it spells none."""
        cell = text.strip(SPACES)
        for template, sign in ((self.negative, -1), (self.positive, 1), ("-#", -1), ("−#", -1), ("+#", 1), ("#", 1)):
            before, _, after = template.strip(SPACES).partition("#")
            if cell.startswith(before) and cell.endswith(after) and len(cell) > len(before) + len(after):
                body = cell[len(before) : len(cell) - len(after)]
                number = read_body(body.strip(SPACES), self.thousands, self.decimal)
                if number is not None:
                    return sign * number
        return None

    def write(self, number: float | int, decimals: int | None) -> str:
        """A number as text, rounded to so many decimals; None: all digits of a float."""
        size = abs(number)
        if isinstance(number, int) or decimals == 0:
            digits = str(size if isinstance(number, int) else round(size))
        elif decimals is None or size == float("inf"):
            digits = repr(float(size))
        else:
            digits = f"{size:.{decimals}f}"
        whole, _, fraction = digits.partition(".")
        if fraction.isdigit() or not fraction:
            fraction = fraction.rstrip("0").ljust(self.least, "0")
        if self.thousands and whole.isdigit():
            whole = f"{int(whole):,}".replace(",", self.thousands)
        digits = whole + (self.decimal + fraction if fraction else "")
        is_zero = not any(c in digits for c in "123456789") and digits[:1].isdigit()
        template = self.negative if number < 0 and not is_zero else self.positive
        return template.replace("#", digits, 1).rjust(self.width)


def read_body(body: str, thousands: str, decimal: str) -> int | float | None:
    """The number of digits with these marks, None if it is none."""
    if thousands:
        if not _grouped(thousands, decimal).fullmatch(body):
            return None
        body = body.replace(thousands, "")
    if decimal != ".":
        if "." in body:
            return None
        body = body.replace(decimal, ".")
    if not PLAIN.fullmatch(body):
        return None
    return int(body) if body.isdigit() else float(body)


@functools.lru_cache
def _grouped(thousands: str, decimal: str) -> re.Pattern:
    t, d = re.escape(thousands), re.escape(decimal)
    return re.compile(rf"(?:[1-9]\d{{0,2}}(?:{t}\d{{3}})+|\d{{1,3}})(?:{d}\d*)?")


class Found(BaseModel):
    """The spelling of a column, its decimals, the texts that are no numbers, and what was assumed."""

    spelling: Spelling
    decimals: int | None
    wrong: list[str]
    assumed: str | None = None


def find_spelling(counts: dict[str, int], given: Spelling | None = None) -> Found | None:
    """How a column spells numbers, None if it holds none.

    Numbers have one sign of a currency before them, or one unit behind them, in all cells. Whole numbers with leading
    zeros or more than 18 digits are codes, and numbers with + and 7 or more digits are telephone numbers.

    Args:
        counts: {text: number of cells}.
        given: the spelling, if it is known.
    """
    if given is not None:
        return _read_by(given, counts)
    split = {text: _split(text) for text in counts}
    templates: Counter[str] = Counter()
    for text, parts in split.items():
        if parts is not None:
            templates[parts[0]] += counts[text]
    chosen = _templates(templates)
    if chosen is None:
        return None
    positive, negative = chosen
    alike = {positive.strip(SPACES), negative.strip(SPACES)}
    bodies = {t: p[1] for t, p in split.items() if p is not None and p[0].strip(SPACES) in alike}
    if not bodies or _are_codes(bodies, positive):
        return None
    marks, assumed = _marks(bodies, counts)
    good = {text: body for text, body in bodies.items() if read_body(body, *marks) is not None}
    if not good or _too_long(good.values(), marks[1]):
        return None
    fractions = [len(body.partition(marks[1])[2]) for body in good.values()]
    has_exponent = any(not set(body) <= set("0123456789.,'’" + SPACES) for body in good.values())
    width = _width(good) if {split[text][0] for text in good} - {positive, negative} else 0  # type: ignore[index]
    if width:
        positive, negative = positive.strip(SPACES), negative.strip(SPACES)
    spelling = Spelling(
        positive=positive,
        negative=negative,
        decimal=marks[1],
        thousands=marks[0],
        least=0 if has_exponent else min(fractions),
        width=width,
    )
    wrong = [text for text in counts if text not in good]
    return Found(spelling=spelling, decimals=None if has_exponent else max(fractions), wrong=wrong, assumed=assumed)


def _read_by(spelling: Spelling, counts: dict[str, int]) -> Found:
    """What a known spelling makes of the texts."""
    read = {text: spelling.read(text) for text in counts}
    fractions = [text.rpartition(spelling.decimal)[2] for text, n in read.items() if isinstance(n, float)]
    decimals = max((sum(c.isdigit() for c in fraction) for fraction in fractions), default=0)
    return Found(spelling=spelling, decimals=decimals, wrong=[text for text, n in read.items() if n is None])


def _split(text: str) -> tuple[str, str] | None:
    """(the text with # for its digits, the digits), None if it has no digits or several numbers."""
    match = EXPONENT.search(text) or BODY.search(text)
    if match is None or "#" in text:
        return None
    before, after = text[: match.start()], text[match.end() :]
    if any(c.isdigit() for c in before + after) or len(after) > UNIT or not _is_prefix(before):
        return None
    return f"{before}#{after}", match.group()


def _is_prefix(text: str) -> bool:
    """Whether this may stand before a number: signs, spaces, an opening parenthesis, a currency."""
    core = text.strip(MINUS + "+(" + SPACES).rstrip(".")
    letters = "".join(c for c in core if unicodedata.category(c) != "Sc").strip(SPACES)
    return not letters or letters.upper() in CURRENCIES or (len(letters) <= 2 and letters != core and letters.isupper())


def _is_negative(template: str) -> bool:
    before, _, after = template.partition("#")
    in_parentheses = before.strip(SPACES).startswith("(") and after.strip(SPACES).endswith(")")
    return in_parentheses or any(c in before for c in MINUS) or after.strip(SPACES) in tuple(MINUS)


def _templates(counts: Counter[str]) -> tuple[str, str] | None:
    """The most frequent template of numbers that are not negative, and that of negative ones."""
    positive = [t for t, _ in counts.most_common() if not _is_negative(t)]
    negative = [t for t, _ in counts.most_common() if _is_negative(t)]
    if not positive and not negative:
        return None
    first = positive[0] if positive else "#"
    if negative:
        if not positive:
            kept = "".join(c for c in negative[0] if c not in MINUS + "()")
            first = kept if "#" in kept else "#"
        return first, negative[0]
    lead = len(first) - len(first.lstrip(SPACES))
    return first, f"{first[:lead]}-{first[lead:].lstrip('+')}"


def _are_codes(bodies: dict[str, str], positive: str) -> bool:
    """Whether digits are codes or telephone numbers rather than numbers."""
    if any(re.match(r"0\d", body) for body in bodies.values()):
        return True
    digits = [len(re.sub(r"\D", "", body)) for body in bodies.values()]
    return positive.strip(SPACES).startswith("+") and min(digits) >= PHONE


def _too_long(bodies, decimal: str) -> bool:
    for body in bodies:
        whole, _, fraction = body.partition(decimal)
        digits, more = (len(re.sub(r"\D", "", part)) for part in (whole, fraction))
        if digits > LONGEST or (more and digits > LONGEST_FRACTION):
            return True
    return False


def _marks(bodies: dict[str, str], counts: dict[str, int]) -> tuple[tuple[str, str], str | None]:
    """(thousands, decimal) that most cells fit, and what was assumed where two fit equally."""
    used = set().union(*bodies.values())
    fits = {
        marks: sum(counts[text] for text, body in bodies.items() if read_body(body, *marks) is not None)
        for marks in MARKS
        if (marks[0] in used or not marks[0]) and (marks[1] in used or marks[1] == ".")
    }
    best = max(fits.values())
    chosen = next(marks for marks in fits if fits[marks] == best)
    without = ("", chosen[0])
    if chosen[0] in (",", ".") and fits.get(without) == best:
        example = next(text for text, body in bodies.items() if chosen[0] in body)
        return chosen, f"{chosen[0]!r} in {example!r} is taken for a mark of thousands, not of decimals"
    return chosen, None


def _width(texts: dict[str, str]) -> int:
    """The number of characters of all texts if spaces on the left fill them to one width, else 0."""
    lengths = {len(text) for text in texts}
    return lengths.pop() if len(lengths) == 1 and all(text == text.rstrip(SPACES) for text in texts) else 0


def to_decimal(number: float | int, decimals: int | None) -> Decimal:
    """A number as a Decimal with so many digits after the point."""
    exact = Decimal(number) if isinstance(number, int) else Decimal(repr(number))
    if decimals is None or not exact.is_finite():
        return exact
    return exact.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_EVEN)
