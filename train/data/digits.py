"""Scikit-learn's handwritten digits with captions from a small grammar.

1,797 images of 8×8 pixels with values 0 … 16: the test part of UCI's Optical Recognition of Handwritten Digits.
"""

from __future__ import annotations

from .dataset import InMemory

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{article} {word}", "the digit {digit}", "number {word}", "{word}")


def captions_of(digit: int) -> list[str]:
    """Every caption of the grammar for a digit."""
    word = NUMERALS[digit]
    article = "an" if word[0] in "aeio" and word != "one" else "a"
    return [template.format(article=article, word=word, digit=digit) for template in TEMPLATES]


GRAMMAR = {caption: digit for digit in range(10) for caption in captions_of(digit)}


def digit_of(caption: str) -> int | None:
    """The digit that a caption names, or None if the caption is not in the grammar."""
    return GRAMMAR.get(caption)


def load() -> InMemory:
    """All digits: image, text (every caption of the grammar) and label, with the digit as annotation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    captions = [captions_of(digit) for digit in data.target.tolist()]
    return InMemory({"image": data.images, "text": captions, "label": data.target}, {"digit": data.target})
