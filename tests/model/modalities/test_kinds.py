"""Every kind of modality: raw values to tensors and back, its processes and streams, and what people see."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anystate import parse_config
from anystate.configs.kinds import shipped_kinds
from anystate.diffusion import Gaussian, Masked, Uniform
from anystate.model.build import build_codecs, build_network, build_space, codec_files, part_names
from anystate.model.codecs.base import NotFitted, as_parts
from anystate.sample.pipeline import build_pipeline


def config_of(*sections: dict, **more):
    modalities = {f"m{i}": {"stream": {"width": 8}, **section} for i, section in enumerate(sections)}
    raw = {"name": "mix", "train": {"steps": 1, "batch": 2}, "network": {"depth": 1, "heads": 2, "head_dim": 4}}
    return parse_config({**raw, "modalities": modalities, **more}, "mix")


def test_there_is_an_example_of_every_kind(examples):
    assert {example.settings["kind"] for example in examples.values()} == set(shipped_kinds())


def test_values_come_back(example, same):
    _, codec = example.fitted()
    encoded = codec.encode(example.values)
    for x in as_parts(encoded).values():
        assert len(x) == len(example.values)
        assert x.dtype in (torch.float32, torch.int64)
    same(codec.decode(encoded), example.expected, example.tolerance)
    few = codec.encode(example.values[:2])
    same(codec.decode(few), example.expected[:2], example.tolerance)


def test_encoded_numbers_are_about_standard(example):
    """Zero mean and unit variance, or values in [−1, 1]."""
    _, codec = example.fitted()
    for x in as_parts(codec.encode(example.values)).values():
        if x.is_floating_point() and example.settings.get("standardize", True):
            x = x[~x.isnan()]
            assert abs(x.mean()) < 0.5
            assert 0.4 < x.std() < 1.3


def test_files_build_the_same_codec(example, same):
    modality, codec = example.fitted()
    files = codec.files()
    assert all(isinstance(content, bytes) for content in files.values())
    again = modality.build_codec(files)
    assert again.is_fitted
    assert again.files() == files
    first, second = (as_parts(c.encode(example.values)) for c in (codec, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[part].nan_to_num(), second[part].nan_to_num()) for part in first)
    same(again.decode(codec.encode(example.values)), example.expected, example.tolerance)


def test_a_fitted_codec_learns_nothing_more(example):
    _, codec = example.fitted()
    files = codec.files()
    codec.fit(example.values[:1])
    assert codec.files() == files


def test_files_are_kept_under_the_name_of_the_modality(example, tmp_path):
    config = config_of(example.settings, {"kind": "label", "classes": ["a", "b"]})
    codecs = build_codecs(config)
    codecs["m0"].fit(example.values)
    files = codec_files(codecs)
    assert all(name.startswith(("m0.", "m1.")) for name in files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert codec_files(build_codecs(config, tmp_path)) == files


def test_a_codec_that_is_not_fitted_says_so(example):
    config = config_of(example.settings)
    codec = build_codecs(config)["m0"]
    if codec.is_fitted:
        build_space(config, {"m0": codec})
        return
    for ask in (build_space, build_network, part_names):
        with pytest.raises(NotFitted, match=r"^m0: its codec is not fitted yet: train first") as error:
            ask(config, {"m0": codec})
        assert "\n" not in str(error.value)
    with pytest.raises(NotFitted, match="not fitted yet"):
        codec.encode(example.values)


def test_some_codecs_must_be_fitted(examples):
    fitted = {name for name, example in examples.items() if example.modality().build_codec({}).is_fitted}
    assert not fitted & {"label", "vector", "series", "columns"}
    assert {"image", "text", "label of given classes", "vector as it is"} <= fitted


def test_processes_streams_losses_and_samplers_have_the_same_parts(example):
    modality, codec = example.fitted()
    processes = as_dict(modality.build_process(codec))
    found = {part: (process.shape, getattr(process, "states", None)) for part, process in processes.items()}
    assert found == example.processes
    assert as_dict(modality.build_stream(codec)).keys() == found.keys()
    assert modality.losses(processes).keys() == found.keys()
    assert modality.samplers().keys() >= found.keys()
    for part, x in as_parts(codec.encode(example.values)).items():
        processes[part].check(part, x)


def as_dict(of_parts) -> dict:
    return of_parts if isinstance(of_parts, dict) else {"": of_parts}


@pytest.mark.parametrize(
    ("name", "process"),
    [("image", Gaussian), ("vector", Gaussian), ("text", Masked), ("uniform text", Uniform), ("label", Masked)],
)
def test_the_process_is_the_one_that_is_set(examples, name, process):
    modality, codec = examples[name].fitted(t_min=0.01)
    built = modality.build_process(codec)
    assert type(built) is process
    assert built.t_min == 0.01


def test_settings_reach_the_process(examples):
    modality, codec = examples["vector"].fitted(prediction_type="v_prediction", schedule={"name": "linear"})
    assert modality.build_process(codec).prediction_type == "v_prediction"
    modality, codec = examples["columns"].fitted(
        numerical={"t_min": 0.02}, categorical={"loss_on": "masked", "loss": {"scale": 2.0}}
    )
    processes = modality.build_process(codec)
    assert (processes["num"].t_min, processes["cat"].loss_on) == (0.02, "masked")
    losses = modality.losses(processes)
    assert (losses["num"].scale, losses["cat"].scale) == (1.0 * 2, 2.0 * 3)  # per column


def test_embedders_and_heads_fit_the_values(example):
    modality, codec = example.fitted()
    x = as_parts(codec.encode(example.values[:2]))
    for part, stream in as_dict(modality.build_stream(codec)).items():
        embed, head = stream.build()
        tokens = embed(x[part].nan_to_num() if x[part].is_floating_point() else x[part])
        assert tokens.shape == (2, stream.tokens, 8)
        out = head(tokens, torch.zeros(2, stream.condition_width))
        shape, states = example.processes[part]
        if states is None:
            assert out.shape == (2, *shape)
        else:
            values = out if isinstance(out, torch.Tensor) else out.values()
            assert values.shape == (2, *shape, states)


def test_samples_of_every_kind_alone_and_beside_another(example):
    """Untrained: values of the right number and form, without masks, one by one readable."""
    for config in (config_of(example.settings), config_of(example.settings, {"kind": "label", "classes": ["a", "b"]})):
        codecs = build_codecs(config)
        codecs["m0"].fit(example.values)
        pipeline = build_pipeline(config, codecs)
        decoded = pipeline.decode(pipeline.sample(n=3, steps=2, seed=1))
        assert list(decoded) == list(config.modalities)
        values = decoded["m0"]
        assert len(values) == 3
        modality = config.modalities["m0"]
        assert len(modality.as_raw(values)) == 3
        singles = modality.split(values)
        assert len(singles) == 3
        assert all(isinstance(modality.render(value), str | Image.Image) for value in singles)
        assert not any("▯" in modality.render(value) for value in singles if isinstance(modality.render(value), str))


def test_files_and_lines_can_be_read(example, tmp_path, same):
    """What `write` or `lines` give, `read` takes, as far as a text tells all of it."""
    modality, codec = example.fitted()
    decoded = codec.decode(codec.encode(example.values[:3]))
    if modality.joined:
        lines = modality.lines(decoded)
        assert len(lines) == len(decoded)
        assert not any("\n" in line for line in lines)
        texts = lines
        if header := modality.header(codec):
            texts = [", ".join(f"{k}={v}" for k, v in row.items() if v) for row in csv.DictReader([header, *lines])]
    else:
        texts = [str(tmp_path / f"{i}{modality.suffix}") for i in range(len(decoded))]
        for value, text in zip(modality.split(decoded), texts, strict=True):
            modality.write(value, tmp_path / text)
    known = modality.encode_condition(codec, [modality.read(text) for text in texts])
    for part, x in as_parts(codec.encode(example.values[:3])).items():
        read, mask = known[part]
        if mask is not None:  # empty cells are not known
            read, x = torch.where(mask, read, 0), torch.where(mask, x, 0)
        torch.testing.assert_close(read, x, rtol=0, atol=0.1)


def test_conditions_of_whole_values(example):
    modality, codec = example.fitted()
    encoded = as_parts(codec.encode(example.values[:2]))
    conditions = modality.encode_condition(codec, example.values[:2])
    assert conditions.keys() == encoded.keys()
    for part, (x, mask) in conditions.items():
        known = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(x[known], encoded[part][known], rtol=0, atol=0.02)  # equal numbers are spread a bit
        assert known.double().mean() > 0.7


def test_features_are_finite_and_differ(example):
    modality, codec = example.fitted()
    features = modality.features(codec, codec.decode(codec.encode(example.values)))
    assert features.shape[0] == len(example.values)
    assert features.ndim == 2
    assert np.isfinite(features).all()
    assert not (features == features[0]).all()


def test_attributes_are_the_classes(example):
    modality, codec = example.fitted()
    decoded = codec.decode(codec.encode(example.values))
    attributes = modality.attributes(codec, decoded)
    if example.settings["kind"] == "label":
        assert attributes[""].tolist() == list(map(str, example.expected))
    elif "colour" in getattr(example.values, "columns", ()):
        assert list(attributes) == ["colour"]
        assert attributes["colour"].tolist() == example.values["colour"].tolist()
    else:
        assert attributes == {}


# Single kinds


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("image", np.zeros((2, 5, 4)), r"\(4, 4, 1\), got \(5, 4, 1\)"),
        ("image", [np.zeros((4, 4)), np.zeros((5, 5))], r"images differ in shape"),
        ("image", np.full((2, 4, 4), 17), r"pixel values must lie in \[0, 16\]"),
        ("text", ["abcabcabc"], "9 characters, the model takes 6"),
        ("text", ["abz"], "outside the vocabulary: 'z'"),
        ("label", ["eleven"], "'eleven' is not a class; there are nine, one, ten"),
        ("vector", [np.zeros(3), np.zeros(2)], r"value 1 has shape \(2,\), the model takes \(3,\)"),
        ("vector", [np.array([0.0, np.nan, 1.0])], "value 0 holds numbers that are not finite"),
        ("vector", ["high"], "could not convert string to float"),
        ("series", [np.zeros((2, 8)), np.zeros((8, 2))], r"value 1 has shape \(8, 2\), the model takes \(2, 8\)"),
        ("series", [np.zeros(8)], r"value 0 has shape \(8,\), the model takes \(2, 8\)"),
    ],
)
def test_values_without_a_code(examples, name, values, message):
    _, codec = examples[name].fitted()
    with pytest.raises(ValueError, match=message):
        codec.encode(values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vector", "1, two, 3", "'1, two, 3' is neither an .npy file nor numbers separated by commas"),
        ("vector", "gone.npy", "'gone.npy' is not a readable .npy file"),
        ("series", "gone.npy", "'gone.npy' is not a readable .npy file"),
        ("image", "gone.png", "'gone.png' not found"),
        ("columns", "age", "'age' is not of the form column=value"),
        ("columns", "{age: 3}", "is not valid JSON"),
    ],
)
def test_texts_that_mean_no_value(examples, name, text, message):
    modality, _ = examples[name].fitted()
    with pytest.raises(ValueError, match=message):
        modality.read(text)


def test_the_modality_names_impossible_settings():
    for section, message in (
        (
            {"kind": "image", "channels": 1, "size": 8, "stream": {"width": 8, "patch": 3}},
            "m0: patch 3 does not divide",
        ),
        ({"kind": "series", "length": 9, "stream": {"width": 8, "patch": 4}, "standardize": False}, "m0: patch 4 does"),
        ({"kind": "vector", "size": 5, "stream": {"width": 8, "patch": 2}, "standardize": False}, "m0: patch 2 does"),
        (
            {"kind": "vector", "size": 5, "standardize": False, "schedule": {"name": "cosine", "options": {"x": 1}}},
            "modalities.m0: schedule cosine does not take the options",
        ),
    ):
        config = config_of(section)
        with pytest.raises(ValueError, match=message):
            build_pipeline(config)


def test_numbers_of_a_vector_are_standardized_each():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, 3)) * [1.0, 100.0, 0.0] + [0.0, 5.0, 7.0]  # the last one is constant
    modality = config_of({"kind": "vector", "size": 3}).modalities["m0"]
    codec = modality.build_codec({})
    codec.fit(list(values))
    x = codec.encode(list(values))
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=5e-3)
    np.testing.assert_allclose(codec.decode(x), values, rtol=1e-5, atol=1e-4)


def test_names_of_a_vector_head_its_file():
    modality = config_of({"kind": "vector", "size": 2, "names": ["height, m", 'said "w"']}).modalities["m0"]
    header, line = modality.header(None), modality.lines([np.array([1.5, -2.0])])[0]
    assert next(csv.DictReader([header, line])) == {"height, m": "1.5", 'said "w"': "-2"}
    assert config_of({"kind": "vector", "size": 2}).modalities["m0"].header(None) is None


def test_classes_are_sorted_and_numbers_by_value():
    modality = config_of({"kind": "label"}).modalities["m0"]
    for values, classes in (
        ([10, 9, 2, 9], ["2", "9", "10"]),
        (np.array([1.0, 0.0]), ["0", "1"]),
        (["b", "a", "10", "9"], ["9", "10", "a", "b"]),
        ([torch.tensor(3), np.int64(2)], ["2", "3"]),
    ):
        codec = modality.build_codec({})
        codec.fit(values)
        assert codec.classes == classes
        assert codec.decode(codec.encode(values)) == [str(int(v)) if not isinstance(v, str) else v for v in values]


def test_classes_that_repeat_are_refused():
    for classes in ([], ["a", "a"]):
        with pytest.raises(ValueError, match=r"modalities.m0: classes are distinct, and at least one"):
            config_of({"kind": "label", "classes": classes})


@pytest.mark.parametrize(("side", "smaller"), [(64, 64), (65, 65), (130, 65), (66, 33)])
def test_features_of_large_images_are_small(side, smaller):
    modality = config_of({"kind": "image", "channels": 1, "size": side}).modalities["m0"]
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 1), dtype=np.uint8)
    features = modality.features(None, images)
    assert features.shape == (2, smaller**2)
    assert abs(features.mean() - images.mean() / 255) < 0.02


def test_a_series_is_drawn_as_a_line_per_channel(examples):
    modality, _ = examples["series"].fitted()
    up, down = np.linspace(0, 1, 8), np.linspace(1, 0, 8)
    picture = np.asarray(modality.render(np.stack([up, down])))
    assert picture.shape == (160, 160, 3)
    coloured = (picture != 255).any(-1)
    assert coloured[:40, :40].any()
    assert coloured[-40:, :40].any()  # one line begins at the top, the other at the bottom
    assert not (np.asarray(modality.render(np.stack([up, up]))) != 255).any(-1)[:40, :40].any()


def test_captions_with_masked_characters_are_known_in_part(examples):
    modality, codec = examples["text"].fitted()
    x, mask = modality.encode_condition(codec, ["a▯b"])[""]
    assert mask.tolist() == [[True, False, True, True, True, True]]
    assert x[0, 0] == 1
    modality, codec = examples["uniform text"].fitted()
    with pytest.raises(ValueError, match="▯ needs a modality under masked diffusion"):
        modality.encode_condition(codec, ["a▯b"])


def test_cells_that_are_left_out_are_not_known(examples):
    modality, codec = examples["columns"].fitted()
    rows = [modality.read("colour=red, age=30"), modality.read('{"rooms": 2}')]
    conditions = modality.encode_condition(codec, rows)
    table = codec.table
    known = {name: conditions["cat"][1][:, i].tolist() for i, name in enumerate(table.categorical)}
    known |= {name: conditions["num"][1][:, i].tolist() for i, name in enumerate(table.numerical) if name == "age"}
    assert known["age"] == [True, False]
    assert known["colour"] == [True, False]
    assert known["rooms"] == [False, True]
    back = codec.decode({part: x for part, (x, _) in conditions.items()})
    assert back["colour"][0] == "red"
    assert back["age"][0] == pytest.approx(30, abs=0.05)
    assert back["rooms"][1] == 2
    for rows, message in (
        ([{"size": 3}], "unknown column 'size'; there are age, colour"),
        ([{"colour": "pink"}], "column 'colour' has no value 'pink'; it has"),
    ):
        with pytest.raises(ValueError, match=message):
            modality.encode_condition(codec, rows)


def test_rows_are_decoded_as_tables_and_as_mappings(examples):
    modality, codec = examples["columns"].fitted()
    table = examples["columns"].values
    rows = table.head(5).to_dict("records")
    assert isinstance(codec.decode(codec.encode(rows)), pd.DataFrame)
    first, second = codec.encode(rows), codec.encode(table.head(5))
    assert all(torch.equal(first[part].nan_to_num(), second[part].nan_to_num()) for part in first)
    assert modality.split(codec.decode(first))[0]["colour"] == table["colour"][0]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_random_cells_are_conditions_of_training(examples, share):
    """A share of the rows, and in them cells at random; the number and the token of a column go together."""
    from anystate.kernels import Rng

    modality, codec = examples["columns"].fitted(conditioning_prob=share)
    drawn = modality.draw_observed(codec, Rng.for_batch(0, 4000), "m0 ")
    if not share:
        assert drawn == {}
        return
    table = codec.table
    both = [name for name in table.numerical if name in table.categorical]
    assert both == ["income"]
    d, c = table.numerical.index("income"), table.categorical.index("income")
    assert torch.equal(drawn["num"][:, d], drawn["cat"][:, c])
    some = torch.cat(list(drawn.values()), 1).any(1).double().mean()
    assert abs(some - share * (1 - 1 / 5)) < 4 * (0.25 / 4000) ** 0.5  # none of four columns: ∫ (1 − p)⁴ dp = 1/5
    another = modality.draw_observed(codec, Rng.for_batch(0, 4000), "other ")
    assert not torch.equal(another["cat"], drawn["cat"])
