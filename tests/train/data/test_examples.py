"""Encoded examples: batches that are functions of (seed, step), versions, absent modalities and gaps."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from anystate import kernels
from anystate.kernels import Draw, Rng
from anystate.kernels.reference import words_to_index
from anystate.model.build import build_codecs
from anystate.model.codecs.arrays import ArrayCodec
from anystate.train.data import digits
from anystate.train.data.dataset import InMemory
from anystate.train.data.examples import ENCODED_AT_ONCE, Examples, encode, encode_values, fit_codecs, flatten, presence
from anystate.train.data.load import encode_split, load_data

ERROR = 1e-6  # a correct implementation fails each statistical test with this probability, over the choice of the seed
MIX = [
    "modalities.label={kind: label, stream: {width: 16}}",
    "modalities.words={kind: text, alphabet: abc, length: 2, stream: {width: 16}}",
    "modalities.row={kind: columns, stream: {width: 16}}",
]


@pytest.fixture(scope="module")
def data(tiny):
    config = tiny()
    return load_data(config, build_codecs(config))


@pytest.fixture(scope="module")
def mix(tiny):
    """Twelve examples of five modalities, with versions of two of them, absent ones, and cells without a number."""
    config = tiny(*MIX)
    numbers = pd.DataFrame({"n": [0.5, None, 2.5] * 4, "c": ["a", "b", "a"] * 4})
    values = {
        "image": [None if i % 4 == 0 else np.full((8, 8), float(i)) for i in range(12)],
        "text": [["a one", "one", "the digit 1"][: 1 + i % 3] for i in range(12)],
        "label": [None if i == 5 else i % 2 for i in range(12)],
        "words": [["ab", "c"]] * 12,
        "row": numbers,
    }
    part = InMemory(values, {"number": np.arange(12)})
    codecs = build_codecs(config)
    fit_codecs(part, codecs, 0, "mine")
    return encode(part, config, codecs, "mine")


# batches


def test_split_is_fixed_by_its_seed_and_disjoint(tiny, data):
    train, test = data
    assert (len(train), len(test)) == (1438, 359)
    again = load_data(tiny(), build_codecs(tiny()))
    assert torch.equal(again[1].x["image"], test.x["image"])
    other = tiny("data.split_seed=1")
    assert not torch.equal(load_data(other, build_codecs(other))[1].x["image"], test.x["image"])
    seen = {row.numpy().tobytes() for row in train.x["image"]}
    assert not [row for row in test.x["image"] if row.numpy().tobytes() in seen]


def test_captions_name_the_digit_of_their_image(tiny, data):
    codec = build_codecs(tiny())["text"]
    assert data[0].x["text"].shape[1] == len(digits.TEMPLATES)
    for digit, versions in zip(data[0].labels["digit"][:50], data[0].x["text"][:50], strict=True):
        assert {digits.digit_of(caption) for caption in codec.decode(versions.long())} == {int(digit)}


def test_an_epoch_shows_every_row_once():
    train = Examples({"x": torch.arange(10.0)[:, None]})
    rows = torch.cat([train.batch(0, step, range(5), 5)["x"] for step in range(2)]).flatten().tolist()
    assert sorted(rows) == list(range(10))
    later = torch.cat([train.batch(0, step, range(5), 5)["x"] for step in (2, 3)]).flatten().tolist()
    assert sorted(later) == list(range(10))
    assert rows != later


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 7), (1,) * 12])
def test_parts_of_a_batch_make_up_the_batch(mix, sizes):
    """Whatever ranks and accumulation steps share the rows."""
    for step in range(3):
        whole = mix.batch(7, step, range(12), 12)
        assert {"image", "text", "label", "words", "row_num", "row_cat", presence("image")} <= set(whole)
        ends = np.cumsum([0, *sizes]).tolist()
        parts = [mix.batch(7, step, range(a, b), 12) for a, b in itertools.pairwise(ends)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_tokens_are_int64_in_batches_whatever_they_are_stored_as(mix):
    assert mix.x["text"].dtype == torch.int16
    assert {value.dtype for name, value in mix.batch(0, 0, range(4), 4).items() if name in ("text", "label")} == {
        torch.int64
    }
    assert mix.first(slice(0, 2))["text"].dtype == torch.int64


# versions


def draws(examples: Examples, row: int, n: int, name: str = "text") -> list[int]:
    """The versions of one example that n rows of a batch draw."""
    index = torch.full((n,), row)
    drawn = examples.at(index, torch.arange(n), seed=3, step=5)[name]
    versions = examples.x[name][row].long()
    return [int((versions == value).all(1).nonzero()[0, 0]) for value in drawn]


@pytest.mark.parametrize("row", [1, 2])
def test_versions_are_drawn_uniformly(mix, row):
    """Row 1 has two captions and row 2 three; both are stored as three."""
    counts = np.bincount(draws(mix, row, 3000), minlength=row + 1)
    assert len(counts) == row + 1
    assert stats.chisquare(counts).pvalue > ERROR


def test_one_version_is_always_drawn(mix):
    assert set(draws(mix, 0, 100)) == {0}


def test_versions_of_two_modalities_are_independent(mix):
    table = stats.contingency.crosstab(draws(mix, 2, 3000), draws(mix, 2, 3000, "words")).count
    assert stats.chi2_contingency(table).pvalue > ERROR


def test_all_captions_of_an_image_are_used(data):
    """40 epochs of one row with four captions miss one of them with probability 4·0.75⁴⁰ = 4e-5."""
    one = Examples({"text": data[0].x["text"][:1]}, versions={"text": torch.tensor([4])})
    seen = {tuple(one.batch(0, step, range(1), 1)["text"][0].tolist()) for step in range(40)}
    assert len(seen) == len(digits.TEMPLATES)


# names of random streams, which are part of the format of results


def test_random_streams(mix):
    index, samples = torch.arange(12), torch.arange(12)
    batch, rng = mix.at(index, samples, seed=4, step=6), Rng(4, samples, 6)
    for name, stream, counts in (
        ("text", "data", mix.versions["text"]),
        ("words", "data words", mix.versions["words"]),
    ):
        words = kernels.reference.random_words(rng.keys(stream, Draw.DATA), 1)[:, 0]
        assert torch.equal(batch[name], mix.x[name][index, words_to_index(words, counts)].long())
    gaps = mix.x["row_num"].isnan()
    noise = kernels.normal(rng.keys("fill row_num", Draw.DATA), 1).view(12, 1)
    torch.testing.assert_close(batch["row_num"][gaps], noise[gaps], rtol=0, atol=0)


def test_random_stream_of_a_table_alone():
    table = Examples({"num": torch.full((5, 2), torch.nan)}, names={"row": {"num": "num"}})
    noise = kernels.normal(Rng(1, torch.arange(5), 2).keys("fill", Draw.DATA), 2)
    torch.testing.assert_close(table.at(torch.arange(5), torch.arange(5), 1, 2)["num"], noise, rtol=0, atol=0)


# absent modalities and gaps


def test_absent_modalities(mix):
    assert mix.present_share == {"image": 0.75, "label": pytest.approx(11 / 12)}
    batch = mix.at(torch.arange(12), torch.arange(12), 0, 0)
    assert batch[presence("image")].tolist() == [i % 4 > 0 for i in range(12)]
    assert batch[presence("label")].tolist() == [i != 5 for i in range(12)]
    assert bool((batch["image"][::4] == 0).all())
    assert presence("text") not in batch
    assert mix.raw[4].keys() == {"text", "label", "words", "row"}
    assert mix.labels["number"].tolist() == list(range(12))


def test_gaps_are_filled_with_fresh_normal_noise():
    x = torch.tensor([[1.0, torch.nan], [torch.nan, 2.0]])
    data = Examples({"x": x})
    batches = [data.at(torch.tensor([0, 1]), torch.tensor([0, 1]), seed=0, step=step)["x"] for step in range(1500)]
    assert all(bool((batch[~x.isnan()] == torch.tensor([1.0, 2.0])).all()) for batch in batches)
    filled = torch.stack([batch[x.isnan()] for batch in batches])
    assert len(filled.unique()) == filled.numel()
    assert stats.kstest(filled.flatten().numpy(), "norm").pvalue > ERROR
    assert stats.pearsonr(*filled.T.numpy()).pvalue > ERROR
    again = data.at(torch.tensor([0, 1]), torch.tensor([0, 1]), seed=0, step=7)["x"]
    assert torch.equal(again, batches[7])


def test_rows_that_are_absent_are_encoded_as_a_table(tiny):
    flat, counts = flatten([{"n": 1, "c": "a"}, None, {"n": 2, "c": "b"}])
    assert flat.to_dict("list") == {"n": [1, 2], "c": ["a", "b"]}
    assert counts.tolist() == [1, 0, 1]


# errors


class Chunks:
    """A codec whose tensors have the size of the largest value of a call."""

    is_fitted = True

    def encode(self, values):
        return torch.zeros(len(values), max(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": [None] * 3, "text": ["one"] * 3}, "mine: no example has the modality image; there are text"),
        ({"image": np.zeros((3, 8, 8)), "text": ["one", "one", "ü"]}, "mine, text: caption 'ü' has characters outside"),
        ({"image": np.zeros((3, 4, 4)), "text": ["one"] * 3}, r"mine, image: expected images of .* got \(4, 4, 1\)"),
        ({"image": [np.zeros((8, 8)), np.zeros((4, 4))], "text": ["one"] * 2}, "mine, image: images differ in shape"),
        (
            {"image": np.full((2, 8, 8), 0.3), "text": ["one"] * 2},
            r"mine, image: pixel values lie in \[0, 1\], not in \[0, 16",
        ),
        ({"image": np.zeros((0, 8, 8)), "text": []}, "mine: there are no examples"),
        ({"image": ["x.png"], "text": ["one"]}, r"mine, image: image 'x\.png' not found"),
    ],
)
def test_data_that_cannot_be_encoded(tiny, values, message):
    config = tiny()
    with pytest.raises(ValueError, match=message):
        encode(InMemory(values), config, build_codecs(config), "mine")


def test_shapes_that_differ_between_chunks(monkeypatch, tiny):
    monkeypatch.setattr("anystate.train.data.examples.ENCODED_AT_ONCE", 2)
    config, part = tiny(), InMemory({"image": [1, 1, 2], "text": ["one"] * 3})
    with pytest.raises(ValueError, match=r"mine, image: values of the shapes \(1,\) and \(2,\)"):
        encode(part, config, build_codecs(config) | {"image": Chunks()}, "mine")


def test_codecs_are_fitted_on_the_training_part(tiny):
    config = tiny(MIX[0], "data.fields={label: label}")
    parts = [
        InMemory({"image": np.zeros((2, 8, 8)), "text": ["one"] * 2, "label": labels}) for labels in ([3, 5], [5, 7])
    ]
    codecs = build_codecs(config)
    with pytest.raises(ValueError, match=r"mine \(held out\), label: '7' is not a class; there are 3, 5"):
        encode_split(*parts, config, codecs, "mine")
    absent = InMemory({"image": np.zeros((2, 8, 8)), "text": ["one"] * 2})
    with pytest.raises(ValueError, match="mine: no example has the modality label"):
        fit_codecs(absent, build_codecs(config), 0, "mine")


def test_errors_count_values_from_their_piece():
    """Values are encoded 4,096 at a time, and codecs count within what they are given."""
    values = [np.zeros(3)] * (ENCODED_AT_ONCE + 2) + [np.zeros(4)]
    codec = ArrayCodec((3,), standardize=False)
    with pytest.raises(ValueError, match=r"sound, counted from value 4096: value 2 has shape \(4,\)"):
        encode_values(codec, values, "sound")
