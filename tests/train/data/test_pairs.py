"""Pairs in memory: the split, the grammar of captions, and batches that are functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anystate.model.codecs.characters import CharCodec
from anystate.model.codecs.pixels import PixelCodec
from anystate.sample.pipeline import build_pipeline
from anystate.train.data import digits
from anystate.train.data.load import load_data
from anystate.train.data.pairs import Pairs, load_npz

IMAGES, TEXT = PixelCodec(3, 2), CharCodec("abc", 3)


@pytest.fixture(scope="module")
def data(tiny):
    return load_data(build_pipeline(tiny()))


def test_grammar_names_every_digit_unambiguously():
    assert len(digits.GRAMMAR) == sum(len(digits.captions_of(d)) for d in range(10))
    assert digits.digit_of("an eight") == 8
    assert digits.digit_of("a one") == 1
    assert digits.digit_of("a eight") is None
    assert digits.digit_of("a seven ") is None


def test_split_is_fixed_by_its_seed_and_disjoint(tiny, data):
    train, test = data
    assert (len(train), len(test)) == (1438, 359)
    again = load_data(build_pipeline(tiny()))
    assert torch.equal(again[1].images, test.images)
    other = load_data(build_pipeline(tiny("data.split_seed=1")))
    assert not torch.equal(other[1].images, test.images)
    seen = {row.numpy().tobytes() for row in train.images}
    assert not [row for row in test.images if row.numpy().tobytes() in seen]


def test_captions_name_the_label_of_their_image(tiny, data):
    codec = build_pipeline(tiny()).codecs["text"]
    for label, choices in zip(data[0].labels[:50], data[0].captions[:50], strict=True):
        assert {digits.digit_of(caption) for caption in codec.decode(choices)} == {int(label)}


def test_an_epoch_shows_every_row_once(data):
    train = Pairs(torch.arange(10.0)[:, None], torch.zeros(10, 1, 2, dtype=torch.int64))
    rows = torch.cat([train.batch(0, step, range(5), 5)["image"] for step in range(2)]).flatten().tolist()
    assert sorted(rows) == list(range(10))
    later = torch.cat([train.batch(0, step, range(5), 5)["image"] for step in (2, 3)]).flatten().tolist()
    assert sorted(later) == list(range(10))
    assert rows != later


def test_parts_of_a_batch_make_up_the_batch(data):
    whole = data[0].batch(7, 3, range(12), 12)
    parts = [data[0].batch(7, 3, range(i, i + 4), 12) for i in (0, 4, 8)]
    for m, value in whole.items():
        assert torch.equal(torch.cat([part[m] for part in parts]), value)


def test_all_captions_of_an_image_are_used(data):
    """40 epochs of one row with four captions miss one of them with probability 4·0.75⁴⁰ = 4e-5."""
    one = Pairs(data[0].images[:1], data[0].captions[:1])
    seen = {tuple(one.batch(0, step, range(1), 1)["text"][0].tolist()) for step in range(40)}
    assert len(seen) == len(digits.TEMPLATES)


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


FIVE_IMAGES, CAPTIONS = np.zeros((5, 2, 2, 3), np.uint8), np.array(["a", "b", "c", "ab", "bc"])


def test_npz_with_its_own_split(tmp_path):
    split = np.array(["train", "test", "train", "train", "test"])
    path = write(tmp_path / "x.npz", images=FIVE_IMAGES, captions=CAPTIONS, split=split)
    train, test = load_npz(path, IMAGES.encode, TEXT.encode, 0.5, 0)
    assert TEXT.decode(train.captions[:, 0]) == ["a", "c", "ab"]
    assert TEXT.decode(test.captions[:, 0]) == ["b", "bc"]


def test_npz_is_found_in_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "x.npz", images=FIVE_IMAGES, captions=CAPTIONS)
    monkeypatch.setenv("ANYSTATE_DATA", str(tmp_path))
    train, test = load_npz("x.npz", IMAGES.encode, TEXT.encode, 0.4, 0)
    assert (len(train), len(test)) == (3, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": FIVE_IMAGES}, "no array 'captions'"),
        ({"images": FIVE_IMAGES, "captions": CAPTIONS[:3]}, "5 images but 3 captions"),
        ({"images": FIVE_IMAGES, "captions": CAPTIONS, "split": np.array(["train"] * 5)}, "0 held-out"),
        ({"images": FIVE_IMAGES, "captions": np.array(["z"] * 5)}, "outside the vocabulary"),
    ],
)
def test_invalid_npz(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_npz(write(tmp_path / "x.npz", **arrays), IMAGES.encode, TEXT.encode, 0.4, 0)


def test_not_an_npz(tmp_path):
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(ValueError, match="not a readable"):
        load_npz(str(tmp_path / "x.npz"), IMAGES.encode, TEXT.encode, 0.4, 0)
