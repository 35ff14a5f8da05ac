"""Captions taken apart, and judges that name pictures and captions in the same attributes."""

from __future__ import annotations

import pytest
import torch

from anystate.bench.quality.captions import Grammar, agreement, attributes, exact_match, split_tones
from anystate.bench.quality.judges import EmojiJudge, judge_of
from anystate.train.data.pairs import Pairs


@pytest.mark.parametrize(
    ("caption", "stem", "tones"),
    [
        ("ear medium-dark skin tone", "ear", ("medium-dark",)),
        ("woman medium skin tone beard", "woman beard", ("medium",)),
        ("kiss light and dark skin", "kiss", ("light", "dark")),
        ("dark sun", "dark sun", ()),
        ("light skin", "light skin", ()),
        ("ear medium-dark skin tones", "ear medium-dark skin tones", ()),
    ],
)
def test_tones_of_a_caption(caption, stem, tones):
    assert split_tones(caption) == (stem, tones)


def test_attributes_follow_the_data_sets_own_arrays(tones):
    """Every caption's attributes are its own base and modifier, also of a toned form of a gendered one."""
    grammar = Grammar(*tones)
    for part in tones:
        columns = (part.meta[k] for k in ("base", "modifier", "kind"))
        for (caption,), base, modifier, kind in zip(part.texts, *columns, strict=True):
            got = dict(grammar.attributes(caption))
            assert grammar.valid(caption)
            if kind == "gender":
                assert got == {"base": base, "modifier": modifier}
            if kind == "two-tone":
                assert (got["tone"], got["second tone"]) == tuple(modifier.split(" and "))
            if kind == "tone":
                assert got["tone"] == modifier
    assert dict(grammar.attributes("woman running dark skin tone")) == {
        "base": "person running", "modifier": "woman", "tone": "dark"
    }  # fmt: skip
    assert not grammar.valid("woman flying dark skin tone")
    assert dict(grammar.attributes("woman flying dark skin tone"))["tone"] == "dark"


def test_agreement_counts_what_either_has():
    truth = [attributes("ear", "", ["dark"]), attributes("ear"), attributes("person bowing", "woman", ["light"])]
    said = [attributes("ear", "", ["light"]), attributes("ear", "", ["dark"]), None]
    got = agreement(said, truth)
    assert got["all"] == 0.0
    assert got["base"] == pytest.approx(2 / 3)
    assert got["tone"] == 0.0  # wrong, one too many, missing
    assert got["modifier"] == 0.0
    assert got["mean"] == pytest.approx(2 / 7)
    assert agreement(truth, truth)["all"] == agreement(truth, truth)["mean"] == 1.0


def test_exact_match():
    assert exact_match(["a", "b", "c "], [["x", "a"], ["a"], ["c"]]) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def judge(tones):
    return judge_of(*tones)


def test_judge_names_held_out_pictures(judge, tones):
    """Compositions never seen: each shape and tone has been, the pair has not."""
    assert isinstance(judge, EmojiJudge)
    test = tones[1]
    truth = judge.captions([texts[0] for texts in test.texts])
    assert len(test) >= 8
    got = agreement(judge.pictures(test.images), truth)
    assert got["base"] == 1.0
    assert got["modifier"] == 1.0
    assert got["mean"] > 0.9
    noisy = test.images + 0.03 * torch.randn(test.images.shape, generator=torch.Generator().manual_seed(0))
    assert agreement(judge.pictures(noisy), truth)["mean"] > 0.85


def test_judge_is_not_fooled(judge, tones):
    """Pictures paired with other captions are judged wrong."""
    test = tones[1]
    truth = judge.captions([texts[0] for texts in test.texts])
    assert agreement(judge.pictures(test.images.roll(1, 0)), truth)["all"] < 0.3


def test_nearest_reference(judge, tones):
    test = tones[1]
    same = judge.nearest(test.images, test.images)
    assert same["text_to_image nearest is the reference"] == 1.0
    assert same["text_to_image RMSE to the reference"] == pytest.approx(0.0, abs=1e-4)
    other = judge.nearest(test.images.roll(1, 0), test.images)
    assert other["text_to_image nearest is the reference"] == 0.0
    shifted = judge.nearest((test.images * 0.9), test.images)
    assert shifted["text_to_image RMSE to the reference"] == pytest.approx(
        float((0.1 * test.images).flatten(1).square().mean(1).sqrt().mean() * 127.5), rel=1e-4
    )


def test_data_without_a_judge():
    bare = Pairs(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no judge for this data set"):
        judge_of(bare, bare)
