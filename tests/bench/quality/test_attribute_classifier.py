"""Attributes of captions, and classifiers that assign the same attributes to images."""

from __future__ import annotations

import pytest
import torch

from anystate.bench.quality.attribute_classifier import EmojiAttributeClassifier, fit_classifier
from anystate.bench.quality.captions import (
    Grammar,
    agreement,
    attributes,
    exact_match,
    split_tones,
    versions_of,
)
from anystate.train.data.dataset import InMemory
from anystate.train.data.examples import Examples


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


def test_attributes_follow_the_arrays_of_the_data_set(tones):
    """The attributes of a caption are its base and modifier, also if it has both a gender and a tone."""
    grammar = Grammar(*tones, text="text")
    for part in tones:
        columns = (part.labels[k] for k in ("base", "modifier", "kind"))
        for (caption,), base, modifier, kind in zip(versions_of(part, "text"), *columns, strict=True):
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


def test_agreement_counts_attributes_that_either_has():
    truth = [attributes("ear", "", ["dark"]), attributes("ear"), attributes("person bowing", "woman", ["light"])]
    predicted = [attributes("ear", "", ["light"]), attributes("ear", "", ["dark"]), None]
    got = agreement(predicted, truth)
    assert got["all"] == 0.0
    assert got["base"] == pytest.approx(2 / 3)
    assert got["tone"] == 0.0  # wrong, extra, missing
    assert got["modifier"] == 0.0
    assert got["mean"] == pytest.approx(2 / 7)
    assert agreement(truth, truth)["all"] == agreement(truth, truth)["mean"] == 1.0


def test_exact_match():
    assert exact_match(["a", "b", "c "], [["x", "a"], ["a"], ["c"]]) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def classifier(tones):
    return fit_classifier(*tones, "image", "text")


@pytest.fixture(scope="module")
def images(tones):
    """The held-out images."""
    return tones[1].first(slice(None))["image"]


def test_held_out_images_are_classified(classifier, tones, images):
    """Unseen combinations: each shape and each tone is in the training images, the pair is not."""
    assert isinstance(classifier, EmojiAttributeClassifier)
    test = tones[1]
    truth = classifier.caption_attributes([texts[0] for texts in versions_of(test, "text")])
    assert len(test) >= 8
    got = agreement(classifier.image_attributes(images), truth)
    assert got["base"] == 1.0
    assert got["modifier"] == 1.0
    assert got["mean"] > 0.9
    noisy = images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert agreement(classifier.image_attributes(noisy), truth)["mean"] > 0.85


def test_wrong_captions_are_detected(classifier, tones, images):
    """Images paired with captions of other images do not agree with them."""
    test = tones[1]
    truth = classifier.caption_attributes([texts[0] for texts in versions_of(test, "text")])
    assert agreement(classifier.image_attributes(images.roll(1, 0)), truth)["all"] < 0.3


def test_distance_to_the_reference(classifier, images):
    same = classifier.distance_to_reference(images, images)
    assert same["text_to_image nearest is the reference"] == 1.0
    assert same["text_to_image RMSE to the reference"] == pytest.approx(0.0, abs=1e-4)
    other = classifier.distance_to_reference(images.roll(1, 0), images)
    assert other["text_to_image nearest is the reference"] == 0.0
    shifted = classifier.distance_to_reference((images * 0.9), images)
    assert shifted["text_to_image RMSE to the reference"] == pytest.approx(
        float((0.1 * images).flatten(1).square().mean(1).sqrt().mean() * 127.5), rel=1e-4
    )


def test_data_sets_without_a_classifier_are_refused():
    raw = InMemory({"image": [None, None], "text": ["a three", "a stone"]}, {"digit": [3, 4]})
    bare = Examples({"image": torch.zeros(2, 1, 4, 4), "text": torch.zeros(2, 3, dtype=torch.int64)}, raw=raw)
    with pytest.raises(ValueError, match="no attribute classifier for this data set"):
        fit_classifier(bare, bare, "image", "text")
