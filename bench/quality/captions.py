"""What captions say, taken apart into attributes, and how well one caption agrees with another.

A data set with the arrays `base` and `modifier` beside its captions (emoji) has captions that are a base with a
modifier. Attributes of such a caption:

- tone, and second tone: the skin tones of the phrases "T skin tone" and "T and T skin", in their order;
- modifier: what the data set's own array says for the rest of the caption, such as woman for "woman running";
- base: its neutral form, "person running".

An attribute that a caption does not have is absent. Two captions are compared on every attribute that either has, so
a tone too many costs as much as one missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...train.data.pairs import Pairs

Attributes = tuple[tuple[str, str], ...]  # (name, value) pairs in a fixed order
TONE = r"(light|medium-light|medium|medium-dark|dark)"
ONE_TONE = re.compile(rf" {TONE} skin tone\b")
TWO_TONES = re.compile(rf" {TONE} and {TONE} skin$")


def split_tones(caption: str) -> tuple[str, tuple[str, ...]]:
    """The caption without its skin tones, and the tones.

    >>> split_tones("woman medium skin tone beard")
    ('woman beard', ('medium',))
    """
    for pattern in (TWO_TONES, ONE_TONE):
        if match := pattern.search(caption):
            return caption[: match.start()] + caption[match.end() :], match.groups()
    return caption, ()


class Grammar:
    """Reads captions of a data set that has the arrays `base` and `modifier` (in `Pairs.meta`).

    Args:
        parts: its splits; every combination of base and modifier they hold is known.
    """

    def __init__(self, *parts: Pairs):
        self.stems: dict[str, tuple[str, str]] = {}
        for part in parts:
            for texts, base, modifier in zip(part.texts, part.meta["base"], part.meta["modifier"], strict=True):
                for text in texts:
                    stem, tones = split_tones(text)
                    if tones:
                        self.stems.setdefault(stem, (stem, ""))  # unless the bare stem says more
                    else:
                        self.stems[stem] = (str(base), str(modifier))

    def attributes(self, caption: str) -> Attributes:
        """Its attributes; of an unknown stem, the stem as base."""
        stem, tones = split_tones(caption)
        base, modifier = self.stems.get(stem, (stem, ""))
        return attributes(base, modifier, tones)

    def valid(self, caption: str) -> bool:
        """Whether its stem is one of the data set; any tones go with it."""
        return split_tones(caption)[0] in self.stems


def attributes(base: str, modifier: str = "", tones: Sequence[str] = ()) -> Attributes:
    names = {"base": base, "modifier": modifier, **dict(zip(("tone", "second tone"), tones, strict=False))}
    return tuple((name, value) for name, value in names.items() if value)


def exact_match(said: Sequence[str], truth: Sequence[Iterable[str]]) -> float:
    """Share of captions that are, letter for letter, one of those of their picture."""
    return sum(s in list(t) for s, t in zip(said, truth, strict=True)) / len(said)


def agreement(said: Sequence[Attributes | None], truth: Sequence[Attributes]) -> dict[str, float]:
    """Shares of right attributes over all answers: `all` (every attribute of an answer right), `mean` (of the single
    attributes) and one per attribute name. None as an answer has nothing right.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    whole = 0
    for answer, wanted in zip(said, truth, strict=True):
        given, want = dict(answer or ()), dict(wanted)
        names = list(want) + [name for name in given if name not in want]
        hits = {name: given.get(name) == want.get(name) for name in names}
        whole += all(hits.values())
        for name, hit in hits.items():
            asked[name] = asked.get(name, 0) + 1
            right[name] = right.get(name, 0) + hit
    shares = {name: right[name] / asked[name] for name in asked}
    return {"all": whole / len(truth), "mean": sum(right.values()) / sum(asked.values()), **shares}
