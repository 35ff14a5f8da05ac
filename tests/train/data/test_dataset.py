"""Data sets in memory, their splits, and the two bundled ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from anystate.train.data import digits
from anystate.train.data.bundled import find_table, load_bundled
from anystate.train.data.dataset import InMemory, Subset, by_split, columns, split_at_random, subset

TABLE = pd.DataFrame({"n": [1, 2, 3], "x": [0.5, 1.5, 2.5]})


class Mine:
    """A data set of a user: map-style, with gaps and annotations."""

    def __init__(self):
        self.labels = {"number": np.arange(3)}

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"text": "abc"[i]} if i else {"text": "a", "image": np.zeros((2, 2))}


def test_values_of_an_example():
    whole = InMemory({"image": np.arange(6).reshape(3, 2), "text": ["a", None, ["b", "c"]], "row": TABLE})
    assert set(whole[1]) == {"image", "row"}
    assert whole[1]["row"] == {"n": 2, "x": 1.5}
    assert isinstance(whole[1]["row"]["n"], int), "numbers keep their type beside columns of another"
    part = whole.subset(np.array([2, 0]))
    assert part.values["text"] == [["b", "c"], "a"]
    assert part.values["row"]["n"].tolist() == [3, 1]
    assert columns(part, ["sound"]) == {"sound": [None, None]}


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ({}, {}, "at least one modality"),
        ({"a": [1], "b": [1, 2]}, {}, "modalities differ in length: 1 of a, 2 of b"),
        ({"a": [1]}, {"digit": np.arange(2)}, "differ in length: 1 of a, 2 of digit"),
    ],
)
def test_lengths_that_differ(values, labels, message):
    with pytest.raises(ValueError, match=message):
        InMemory(values, labels)


def test_subsets_of_a_data_set_of_a_user():
    part = subset(Mine(), np.array([2, 0]))
    assert isinstance(part, Subset)
    assert (len(part), part[0]) == (2, {"text": "c"})
    assert part.labels["number"].tolist() == [2, 0]
    found = columns(part, ["text", "image"])
    assert found["text"] == ["c", "a"]
    assert found["image"][0] is None
    with pytest.raises(ValueError, match="example 0 of the data set is a int, not a mapping"):
        columns([1, 2], ["text"])


def test_random_split_is_fixed_by_its_seed_and_disjoint():
    whole = InMemory({"n": np.arange(100)})
    train, test = split_at_random(whole, 0.2, 0)
    assert (len(train), len(test)) == (80, 20)
    assert sorted([*train.values["n"], *test.values["n"]]) == list(range(100))
    assert split_at_random(whole, 0.2, 0)[1].values["n"].tolist() == test.values["n"].tolist()
    assert split_at_random(whole, 0.2, 1)[1].values["n"].tolist() != test.values["n"].tolist()


def test_split_by_names():
    whole = InMemory({"n": np.arange(4)})
    train, test = by_split(whole, ["train", "val", "test", "train"], "x.npz")
    assert (train.values["n"].tolist(), test.values["n"].tolist()) == ([0, 3], [1, 2])
    assert by_split(whole, [""] * 4, "x.npz") is whole
    for splits, message in (
        (["train", "dev", "test", "train"], "x.npz: split 'dev' of example 1; it must be train, test or validation"),
        (["train", None, "test", "train"], "x.npz: split '' of example 1"),
        (["train"] * 4, "x.npz: 4 training and 0 held-out examples"),
    ):
        with pytest.raises(ValueError, match=message):
            by_split(whole, splits, "x.npz")


def test_grammar_names_every_digit_unambiguously():
    assert len(digits.GRAMMAR) == sum(len(digits.captions_of(d)) for d in range(10))
    assert digits.digit_of("an eight") == 8
    assert digits.digit_of("a one") == 1
    assert digits.digit_of("a eight") is None
    assert digits.digit_of("a seven ") is None


def test_captions_name_the_digit_of_their_image():
    whole = digits.load()
    for i in range(50):
        assert {digits.digit_of(caption) for caption in whole[i]["text"]} == {int(whole.labels["digit"][i])}


def test_bundled_tables(tmp_path, monkeypatch):
    assert find_table("adult").name == "train.csv.gz"
    monkeypatch.setenv("ANYSTATE_DATA", str(tmp_path))
    (tmp_path / "mine.csv").write_text("a\n1\n")
    assert find_table("mine.csv") == tmp_path / "mine.csv"
    with pytest.raises(ValueError, match=r"table 'other\.csv' not found; bundled sets: adult"):
        find_table("other.csv")
    with pytest.raises(ValueError, match="data set 'other' is not bundled"):
        load_bundled("other")
