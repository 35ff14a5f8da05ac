"""Attributes of captions, and agreement between two lists of attributes.

A data set with the arrays `base` and `modifier` beside its captions (emoji) has captions that consist of a base and a
modifier. Attributes of such a caption:

- tone, and second tone: the skin tones of the phrases "T skin tone" and "T and T skin", in their order;
- modifier: what the data set's own array says for the rest of the caption, such as woman for "woman running";
- base: its neutral form, "person running".

An attribute that a caption does not have is absent. Two captions are compared on every attribute that either has, so
that an extra tone counts as much as a missing one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...train.data.examples import Examples

Attributes = tuple[tuple[str, str], ...]  # (name, value) pairs in a fixed order
TONE = r"(light|medium-light|medium|medium-dark|dark)"
ONE_TONE = re.compile(rf" {TONE} skin tone\b")
TWO_TONES = re.compile(rf" {TONE} and {TONE} skin$")


def versions_of(examples: Examples, m: str) -> list[list[str]]:
    """All versions of the raw texts of a modality, by example."""
    values = examples.raw.values[m] if examples.raw is not None else []
    return [list(value) if isinstance(value, list) else [str(value)] for value in values]


def split_tones(caption: str) -> tuple[str, tuple[str, ...]]:
    """The caption without its skin tones, and the tones.

    >>> split_tones("woman medium skin tone beard")
    ('woman beard', ('medium',))
    """
    for pattern in (TWO_TONES, ONE_TONE):
        match = pattern.search(caption)
        if match:
            return caption[: match.start()] + caption[match.end() :], match.groups()
    return caption, ()


class Grammar:
    """Parses captions of a data set that has the arrays `base` and `modifier` (in `Examples.labels`).

    Args:
        parts: splits of the data set; the grammar knows every caption without tones ("stem") that occurs in them.
        text: name of the text modality.
    """

    def __init__(self, *parts: Examples, text: str):
        self.stems: dict[str, tuple[str, str]] = {}
        for part in parts:
            columns = (versions_of(part, text), part.labels["base"], part.labels["modifier"])
            for texts, base, modifier in zip(*columns, strict=True):
                for caption in texts:
                    self._add(caption, str(base), str(modifier))

    def _add(self, caption: str, base: str, modifier: str) -> None:
        stem, tones = split_tones(caption)
        if tones:  # the modifier is the tone: a caption without tones says more about the stem
            self.stems.setdefault(stem, (stem, ""))
        else:
            self.stems[stem] = (base, modifier)

    def attributes(self, caption: str) -> Attributes:
        """The attributes of a caption; if its stem is unknown, the stem is the base."""
        stem, tones = split_tones(caption)
        base, modifier = self.stems.get(stem, (stem, ""))
        return attributes(base, modifier, tones)

    def valid(self, caption: str) -> bool:
        """Whether the stem occurs in the data set; any tones are valid."""
        return split_tones(caption)[0] in self.stems


def attributes(base: str, modifier: str = "", tones: Sequence[str] = ()) -> Attributes:
    """(name, value) pairs of the attributes that are not empty."""
    names = {"base": base, "modifier": modifier}
    names.update(zip(("tone", "second tone"), tones, strict=False))
    return tuple((name, value) for name, value in names.items() if value)


def exact_match(predicted: Sequence[str], truth: Sequence[Iterable[str]]) -> float:
    """Share of captions that equal one of the reference captions of their image."""
    return sum(caption in list(references) for caption, references in zip(predicted, truth, strict=True)) / len(
        predicted
    )


def agreement(predicted: Sequence[Attributes | None], truth: Sequence[Attributes]) -> dict[str, float]:
    """Shares of correct attributes over all predictions.

    Returns:
        `all` (every attribute of a sample correct), `mean` (over single attributes) and one share per attribute name.
        A prediction of None has no correct attribute.
    """
    correct: dict[str, int] = {}
    total: dict[str, int] = {}
    all_correct = 0
    for sample, reference in zip(predicted, truth, strict=True):
        hits = _compare(dict(sample or ()), dict(reference))
        all_correct += all(hits.values())
        for name, hit in hits.items():
            total[name] = total.get(name, 0) + 1
            correct[name] = correct.get(name, 0) + hit
    shares = {"all": all_correct / len(truth), "mean": sum(correct.values()) / sum(total.values())}
    for name in total:
        shares[name] = correct[name] / total[name]
    return shares


def _compare(sample: dict[str, str], reference: dict[str, str]) -> dict[str, bool]:
    """{attribute: whether equal} for every attribute that either has."""
    names = list(reference) + [name for name in sample if name not in reference]
    return {name: sample.get(name) == reference.get(name) for name in names}
