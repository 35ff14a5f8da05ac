"""Scikit-learn's handwritten digits with captions from a small grammar.

1,797 pictures of 8×8 pixels with values 0 … 16: the test part of UCI's Optical Recognition of Handwritten Digits.
"""

from __future__ import annotations

import numpy as np
import torch

from .pairs import Encode, Pairs, split_rows

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{article} {word}", "the digit {digit}", "number {word}", "{word}")


def captions_of(digit: int) -> list[str]:
    """Every caption the grammar has for a digit."""
    word = WORDS[digit]
    article = "an" if word[0] in "aeio" and word != "one" else "a"
    return [t.format(article=article, word=word, digit=digit) for t in TEMPLATES]


GRAMMAR = {caption: digit for digit in range(10) for caption in captions_of(digit)}


def digit_of(caption: str) -> int | None:
    """The digit a caption names, or None if it is not in the grammar."""
    return GRAMMAR.get(caption)


def load(encode_images: Encode, encode_captions, test_share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, split by seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = encode_images(data.images), torch.from_numpy(data.target.astype(np.int64))
    captions = torch.stack([encode_captions(captions_of(d)) for d in range(10)])
    return tuple(
        Pairs(images[rows], captions[labels[rows]], labels[rows]) for rows in split_rows(len(images), test_share, seed)
    )
