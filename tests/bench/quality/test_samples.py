"""Directions of sampling for any mix, conditions of incomplete data, and folders of earlier versions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from anystate.bench.quality.samples import Samples, directions, given, upgraded
from anystate.model.build import build_codecs
from anystate.sample.pipeline import build_pipeline
from anystate.train.data.dataset import InMemory
from anystate.train.data.load import encode_split, load_data

SETTINGS = {"seed": 0, "steps": 2, "precision": "fp32"}


def load(config):
    """(pipeline with random weights, training examples, held-out examples)."""
    codecs = build_codecs(config)
    train, test = load_data(config, codecs)
    return build_pipeline(config, codecs), train, test


@pytest.fixture(scope="module")
def loaded(three):
    return load(three())


def test_directions_of_an_image_and_a_text_keep_their_names(tiny):
    pipeline = build_pipeline(tiny())
    assert directions(pipeline) == {"joint": (), "image_to_text": ("image",), "text_to_image": ("text",)}


def test_directions_of_three_modalities(loaded):
    found = directions(loaded[0])
    assert found["joint"] == ()
    assert found["given_label"] == ("label",)
    assert found["image_given_rest"] == ("label", "text")
    assert len(found) == 1 + 3 + 3
    assert given(loaded[0], "text") == "given_text"


def test_modalities_that_are_never_generated_are_conditions(three):
    """Without a head for captions, every direction has them as a condition."""
    pipeline = load(three("modalities.text.stream.output=false"))[0]
    found = directions(pipeline)
    assert set(found) == {"given_text", "image_given_rest", "label_given_rest"}
    assert all("text" in conditions for conditions in found.values())


def test_conditions_are_held_out_examples(loaded):
    pipeline, _, test = loaded
    samples = Samples(pipeline, test, None, SETTINGS)
    drawn, index = samples.draw("image_given_rest", 10), samples.examples("image_given_rest", 10)
    assert index.tolist() == list(range(10))
    for name in ("label", "text"):
        assert torch.equal(drawn[name], test.first(index)[name])
    assert drawn["image"].shape == (10, 1, 8, 8)
    assert torch.equal(samples.draw("image_given_rest", 4)["image"], drawn["image"][:4])
    with pytest.raises(ValueError, match="cannot be sampled in the direction up; possible: joint"):
        samples.draw("up", 4)


def test_examples_that_lack_the_condition_are_left_out(three):
    """Every second example has no label; no example has both a label and a caption."""
    config = three()
    codecs = build_codecs(config)
    n = 12
    images = np.random.default_rng(0).uniform(0, 16, (n, 8, 8))
    values = {
        "image": images,
        "label": [i % 3 if i % 2 else None for i in range(n)],
        "text": [None if i % 2 else "a zero" for i in range(n)],
    }
    _, test = encode_split(InMemory(values), InMemory(values), config, codecs, "data")
    samples = Samples(build_pipeline(config, codecs), test, None, SETTINGS)
    assert samples.examples("given_label", 7).tolist() == [1, 3, 5, 7, 9, 11, 1]
    assert "image_given_rest" not in samples.directions
    drawn = samples.draw("given_label", 3)
    assert torch.equal(drawn["label"], test.first(torch.tensor([1, 3, 5]))["label"])


def test_folders_of_earlier_versions_are_continued(tiny, tmp_path):
    """A data set was named by data.name and data.path."""
    old = {**SETTINGS, "data": {"name": "npz", "path": "a.npz", "test_share": 0.2, "split_seed": 0}}
    new = {**SETTINGS, "data": {"source": "a.npz", "test_share": 0.2, "split_seed": 0}}
    assert upgraded(old) == new
    (tmp_path / "settings.json").write_text(json.dumps(old))
    pipeline, _, test = load(tiny())
    assert Samples(pipeline, test, tmp_path, new).directions
    with pytest.raises(ValueError, match="choose another --out"):
        Samples(pipeline, test, tmp_path, {**new, "seed": 1})
