"""The character encoding of a text file, guessed only where the bytes leave no doubt.

UTF-8 and UTF-16 can be recognized. The 8-bit code pages cannot: the same byte is è in one and č in another. So every
code page is tried with the alphabets of the languages that it is used for, and the guess counts if all that can be
meant are the same text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

BOM = "\ufeff"  # the byte order mark, as a character
BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins like UTF-16: tried before it
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WESTERN = {
    "German": "äöüß", "French": "àâæçéèêëîïôœùûü", "Spanish": "áéíñóúü¿¡ªº", "Portuguese": "áâãàçéêíóôõúüªº",
    "Italian": "àèéìíîòóùú", "Danish, Norwegian": "æøåéóòôèê", "Swedish, Finnish": "åäöé", "Dutch": "áèéëïíóöüú",
    "Icelandic": "áðéíóúýþæö", "Catalan": "àçèéíïòóúü",
}  # fmt: skip
ALPHABETS = {
    "cp1252": WESTERN,
    "mac_roman": WESTERN,
    "cp1250": {
        "Polish": "ąćęłńóśźż", "Czech": "áčďéěíňóřšťúůýž", "Slovak": "áäčďéíĺľňóôŕšťúýž", "Hungarian": "áéíóöőúüű",
        "Croatian, Slovenian": "čćđšž", "Romanian": "ăâîşţ", "German": "äöüß",
    },
    "cp1254": {"Turkish": "çğıöşüİâîû"},
    "cp1257": {"Lithuanian": "ąčęėįšųūž", "Latvian": "āčēģīķļņšūž", "Estonian": "äõöüšž"},
}  # fmt: skip
SYMBOLS = "€£§°©®µ±²³½¼¾«»×÷–—…’\u00a0"
EXAMPLES = "cp1252 (Western Europe), cp1250 (Central Europe), cp1251 (Cyrillic), shift_jis, gb18030, …"


def decode(data: bytes, where: str, encoding: str | None = None, usual: str | None = None) -> tuple[str, str, str]:
    """(text, encoding, byte order mark or "") of a file; error messages begin with `where`.

    Args:
        encoding: as the user says.
        usual: of other files of this kind, where the bytes leave the choice open.

    Raises:
        ValueError: other bytes than the encoding has, binary data, or no safe guess.
    """
    bom = next((bom for bom in BOMS if data.startswith(bom)), b"")
    if encoding is not None:
        encoding = encoding.lower()
        if bom and encoding.replace("_", "-") in (BOMS[bom], BOMS[bom][:-3], f"{BOMS[bom]}-sig"):
            return _decoded(data[len(bom) :], BOMS[bom], where), BOMS[bom], BOM
        return _decoded(data, encoding, where), encoding, ""
    if bom:
        return _decoded(data[len(bom) :], BOMS[bom], where), BOMS[bom], BOM
    wide = _utf16_without_mark(data)
    if wide is not None:
        return _decoded(data, wide, where), wide, ""
    if b"\0" in data:
        raise ValueError(f"{where} holds binary data of an unknown format, not a table")
    try:
        return data.decode("utf-8"), "utf-8", ""
    except UnicodeDecodeError as error:
        encoding = _code_page(data, where, error.start, usual)
        return _decoded(data, encoding, where), encoding, ""


def encoding_name(encoding: str, is_marked: bool) -> str:
    """Python's name of an encoding with or without a byte order mark."""
    if not is_marked:
        return encoding
    return "utf-8-sig" if encoding == "utf-8" else encoding.rsplit("-", 1)[0]


def _decoded(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError:
        raise ValueError(f"--encoding {encoding}: there is no such encoding; there are utf-8, {EXAMPLES}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not {encoding} at byte {error.start}; give another --encoding") from None


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 if every other byte of the beginning is mostly zero, and none of the rest."""
    even, odd = data[:4000:2], data[1:4000:2]
    for zeros, others, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if len(zeros) > 3 and zeros.count(0) > 0.7 * len(zeros) and not others.count(0):
            return name
    return None


def _code_page(data: bytes, where: str, start: int, usual: str | None) -> str:
    """The code page of bytes that are not UTF-8 from byte `start` on."""
    found: dict[str, str] = {}
    for page, text in _plausible(data):
        found.setdefault(text, page)
    if len(found) == 1:
        return next(iter(found.values()))
    if usual not in (None, "utf-8"):
        return usual
    problem = f"{where}: not UTF-8 at byte {start}, "
    if not found:
        raise ValueError(f"{problem}and no other encoding is certain; give --encoding: {EXAMPLES}")
    different = next(i for i, letters in enumerate(zip(*found, strict=True)) if len(set(letters)) > 1)
    meant = " or ".join(f"{page} ({_word(text, different)!r})" for text, page in found.items())
    raise ValueError(f"{problem}and it could be {meant}; give --encoding")


def _plausible(data: bytes) -> Iterator[tuple[str, str]]:
    """(code page, text) of the high bytes and their neighbours, for every alphabet that has all letters."""
    if re.search(rb"[\x80-\xff]{4}", data):  # words of such letters alone: Greek, Cyrillic, Chinese, …
        return
    parts = b"\n".join(sorted(set(re.findall(rb"[A-Za-z]*[\x80-\xff][A-Za-z\x80-\xff]*", data))))
    for page, alphabets in ALPHABETS.items():
        try:
            text = parts.decode(page)
        except UnicodeDecodeError:
            continue
        letters = {c for c in text if ord(c) > 127} - set(SYMBOLS)
        if letters and not _are_words(text):
            continue
        if re.search(rf"[^\W\d_][{SYMBOLS[:-2]}][^\W\d_]|…[^\W\d_]|[a-zß-ÿ][À-Þ]", text):  # a sign within a word
            continue
        if any(letters <= {*own, *own.upper()} for own in alphabets.values()):
            yield page, text


def _are_words(text: str) -> bool:
    """Whether letters beyond ASCII stand beside others, as in all languages here; да and Б are words without any."""
    words = re.findall(r"[^\W\d_]+", text)
    alone = [word for word in words if not re.search("[A-Za-z]", word)]
    return len(alone) < len(words) and not any(len(word) > 1 or word.isupper() for word in alone)


def _word(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    return text[start:].split("\n", 1)[0]
