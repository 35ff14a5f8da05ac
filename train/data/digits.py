"""Scikit-learn's handwritten digits with captions from a small grammar.

1,797 images of 8×8 pixels with values 0 … 16: the test part of UCI's Optical Recognition of Handwritten Digits.
"""

from __future__ import annotations

import numpy as np
import torch

from .pairs import EncodeCaptions, EncodeImages, Pairs, split_rows

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


def load(
    encode_images: EncodeImages, encode_captions: EncodeCaptions, test_share: float, seed: int
) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, split by `seed`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = encode_images(data.images)
    labels = torch.from_numpy(data.target.astype(np.int64))
    captions = torch.stack([encode_captions(captions_of(digit)) for digit in range(10)])
    pairs = Pairs(images, captions[labels], labels)
    train, test = split_rows(len(images), test_share, seed)
    return pairs.subset(train), pairs.subset(test)
