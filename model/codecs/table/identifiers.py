"""Identifiers that never repeat: recognized, and new ones in the same spelling.

New identifiers are a function of the number of their row. None of them is one of training: a number that they hold is
larger than all in training, or leaves another remainder, or has 122 random bits.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
import uuid
from typing import Any

UUID = re.compile(r"\{?[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}\}?", re.IGNORECASE)
EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[A-Za-z]+")
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)
NAMED = re.compile(
    r"(^|[_ .\-])(id|ids|key|uuid|guid|no|nr|number|phone|telephone|mobile|isbn|iban|ssn|imei)$|"
    r"[a-z](Id|ID|Key|No|Nr|Number|Uuid|UUID|Guid)$"
)
CLASSES = (string.digits, string.ascii_uppercase, string.ascii_lowercase, string.digits + "ABCDEF",
           string.digits + "abcdef", string.digits + string.ascii_uppercase, string.digits + string.ascii_lowercase,
           string.ascii_letters, string.digits + string.ascii_letters)  # fmt: skip


def is_named_key(name: Any) -> bool:
    """Whether a column's name says that it holds keys."""
    return NAMED.search(str(name)) is not None or NAMED.search(str(name).lower()) is not None


def find_pattern(texts: list[str], name: Any) -> dict[str, Any] | str:
    """How to make new identifiers like these distinct texts; a text stands for itself and the number of the row."""
    if all(UUID.fullmatch(text) for text in texts):
        first = texts[0]
        return {"form": "uuid", "hyphens": "-" in first, "braces": first[0] == "{", "upper": first.upper() == first}
    if all(EMAIL.fullmatch(text) for text in texts):
        return {"form": "email", "before": f"{name}-", "after": "@example.com"}
    numbered = _numbered(texts)
    if numbered is not None:
        return numbered
    return _code(texts) or f"{name}-"


def _numbered(texts: list[str]) -> dict[str, Any] | None:
    """A number in one place, the rest alike: CUST-00017, 2020/0017/A."""
    first = NUMBERED.fullmatch(texts[0])
    for split in (re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL), re.compile(r"(.*\D|)(\d+)(\D*)", re.DOTALL)):
        parts = [split.fullmatch(text) for text in texts]
        if first is None or any(part is None for part in parts):
            return None
        around = {(part[1], part[3]) for part in parts if part is not None}
        if len(around) == 1:
            (before, after), digits = around.pop(), [part[2] for part in parts if part is not None]
            is_padded = any(d[0] == "0" and len(d) > 1 for d in digits) or len({len(d) for d in digits}) == 1
            width = max(map(len, digits)) if is_padded else 1
            following = max(map(int, digits)) + 1
            return {"form": "number", "before": before, "after": after, "width": width, "next": str(following)}
    return None


def _code(texts: list[str]) -> dict[str, Any] | None:
    """Characters of one class in each place: X7F3K9. As numbers, new codes leave a remainder that no old one does."""
    if len({len(text) for text in texts}) != 1 or len(texts[0]) > 40:
        return None
    places = []
    for column in zip(*texts, strict=True):
        seen = set(column)
        places.append(column[0] if len(seen) == 1 else next((c for c in CLASSES if seen <= set(c)), ""))
    if "" in places:
        return None
    modulus = len(texts) + 1
    remainders = {_to_number(text, places) % modulus for text in texts}
    remainder = next(r for r in range(modulus) if r not in remainders)
    if math.prod(map(len, places)) // modulus < 2 * len(texts):
        return None
    return {"form": "code", "places": places, "modulus": modulus, "remainder": remainder}


def _to_number(text: str, places: list[str]) -> int:
    number = 0
    for character, known in zip(text, places, strict=True):
        number = number * len(known) + known.index(character)
    return number


def new_identifier(pattern: dict[str, Any] | str, row: int) -> str:
    """The identifier of a new row; rows are counted from 0."""
    if isinstance(pattern, str):
        return f"{pattern}{row + 1}"
    if pattern["form"] == "number":
        return f"{pattern['before']}{int(pattern['next']) + row:0{pattern['width']}d}{pattern['after']}"
    if pattern["form"] == "email":
        return f"{pattern['before']}{row + 1}{pattern['after']}"
    if pattern["form"] == "uuid":
        return _new_uuid(pattern, row)
    places, modulus = pattern["places"], pattern["modulus"]
    count = (math.prod(map(len, places)) - pattern["remainder"] - 1) // modulus + 1
    number = pattern["remainder"] + modulus * (_scattered(row % count, count))
    out = []
    for known in reversed(places):
        number, digit = divmod(number, len(known))
        out.append(known[digit])
    code = "".join(reversed(out))
    return code if row < count else f"{code}-{row // count}"


def _scattered(row: int, count: int) -> int:
    """A permutation of range(count) that looks random."""
    factor = int(count * 0.6180339887498949) | 1
    while math.gcd(factor, count) != 1:
        factor += 2
    return (row * factor + count // 3) % count


def _new_uuid(pattern: dict[str, Any], row: int) -> str:
    digest = hashlib.blake2b(str(row).encode(), digest_size=16, person=b"anystate uuid").digest()
    made = uuid.UUID(bytes=digest, version=4)
    text = str(made) if pattern["hyphens"] else made.hex
    text = text.upper() if pattern["upper"] else text
    return "{" + text + "}" if pattern["braces"] else text
