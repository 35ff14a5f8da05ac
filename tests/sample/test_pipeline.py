"""`Pipeline`: raw values in and out, in every direction; saved, loaded, and on the hub."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from anystate.configs.load import load_config
from anystate.configs.runs import resolve
from anystate.sample import Condition, hub
from anystate.sample.pipeline import Pipeline
from anystate.sample.table.rows import TableSampler
from anystate.train.data.dataset import InMemory
from anystate.train.trainer import Trainer

NAMES = ("image", "label", "sound", "row")
SUBSETS = [given for k in (1, 2, 3) for given in itertools.combinations(NAMES, k)]


@pytest.fixture(scope="module")
def pipe(mixed):
    return Pipeline.from_pretrained(mixed)


@pytest.fixture(scope="module")
def drawn(pipe):
    """Three joint samples."""
    return pipe(n=3, seed=1)


def as_lists(out) -> dict[str, list]:
    """Samples in plain Python, to compare them."""
    plain = {m: [np.asarray(value).tolist() for value in out[m]] for m in ("image", "sound")}
    return plain | {"label": out["label"], "row": out["row"].to_dict("records")}


def test_joint_samples_are_raw_values(pipe, drawn):
    assert list(drawn) == list(NAMES)
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in drawn["image"])
    assert set(drawn["label"]) <= {"class 0", "class 1", "class 2"}
    assert all(x.shape == (2, 16) and x.dtype == np.float32 for x in drawn["sound"])
    assert isinstance(drawn["row"], pd.DataFrame)
    assert list(drawn["row"]) == ["age", "sex", "income"]
    assert all(len(values) == 3 for values in drawn.values())
    assert len({image.tobytes() for image in drawn["image"]}) == 3


def test_samples_are_those_of_the_sampler(pipe, drawn):
    """The same numbers as `Pipeline.sample` and the codecs give; a seed gives the same again, another one others."""
    expected = pipe.decode(pipe.sample(n=3, seed=1, batch_size=3))
    assert [np.asarray(image).tolist() for image in drawn["image"]] == expected["image"][..., 0].tolist()
    np.testing.assert_allclose(drawn["sound"], expected["sound"], rtol=1e-6)
    assert as_lists(pipe(n=3, seed=1)) == as_lists(drawn)
    assert as_lists(pipe(n=3, seed=2)) != as_lists(drawn)


def test_sample_i_is_the_same_for_every_number_of_samples(pipe, drawn):
    """Twelve samples are two batches."""
    more = pipe(n=12, seed=1)
    np.testing.assert_allclose(more["sound"][:3], drawn["sound"], atol=1e-3)
    assert more["label"][:3] == drawn["label"]
    assert len({x.tobytes() for x in more["sound"]}) == 12


@pytest.mark.parametrize("given", SUBSETS, ids="+".join)
def test_any_part_given_any_other(pipe, drawn, given):
    """Conditions come out as they went in, in order, n times each; the rest is sampled, and depends on them."""
    out = pipe({m: drawn[m] for m in given}, n=2, seed=4)
    plain, before, other = as_lists(out), as_lists(drawn), as_lists(pipe(n=6, seed=4))
    for m in NAMES:
        assert len(plain[m]) == 6
        assert (plain[m] == [value for value in before[m] for _ in range(2)]) == (m in given), m
    sampled = [m for m in NAMES if m not in given]
    assert sampled == ["label"] or any(plain[m] != other[m] for m in sampled)
    if "sound" in sampled:
        assert len({x.tobytes() for x in out["sound"]}) == 6


def test_one_value_goes_with_all_others(pipe, drawn):
    one = pipe({"label": "class 1", "image": drawn["image"]}, seed=3)
    many = pipe({"label": ["class 1"] * 3, "image": drawn["image"]}, seed=3)
    assert one["label"] == ["class 1"] * 3
    assert as_lists(one) == as_lists(many)


def test_values_may_be_arrays_and_files(pipe, drawn, tmp_path):
    drawn["image"][0].save(tmp_path / "x.png")
    images = [drawn["image"][0], np.asarray(drawn["image"][0]), tmp_path / "x.png"]
    outs = [as_lists(pipe({"image": image}, seed=2)) for image in images]
    assert outs[0] == outs[1] == outs[2]


def test_cells_that_are_missing_are_sampled(pipe):
    table = pd.DataFrame({"age": [30, None, 50], "sex": ["Male", "Female", None]})
    rows = pipe({"row": table}, n=4)["row"]
    assert len(rows) == 12
    assert (rows["age"][:4] == 30).all()
    assert (rows["age"][8:] == 50).all()
    assert rows["sex"].tolist()[:8] == ["Male"] * 4 + ["Female"] * 4
    assert rows.notna().all().all()
    assert rows["income"].nunique() > 1
    dicts = pipe({"row": [{"age": 30, "sex": "Male"}, {"sex": "Female"}, {"age": 50}]}, n=4)["row"]
    pd.testing.assert_frame_equal(dicts, rows)
    assert (pipe({"row": {"age": 41}, "label": ["class 0", "class 1"]}, n=3)["row"]["age"] == 41).all()


def test_given_numbers_come_back_as_they_were_given(pipe):
    """Not at the resolution of the quantiles, nor clipped to the range of training; noised ones are sampled."""
    given = {"row": [{"income": 21.57}, {"income": 1e6}, {"age": "200"}, {"age": None, "sex": "Male"}]}
    rows = pipe(given, n=2)["row"]
    assert rows["income"].tolist()[:4] == [21.57, 21.57, 1e6, 1e6]
    assert rows["age"].tolist()[4:6] == [200, 200]
    assert rows["age"].dtype == np.int64
    assert rows["age"].max() == 200
    assert rows["income"][4:].between(0, 100).all()
    assert pipe({"row": {"income": 1e6}}, noise_levels={"row": 0.5})["row"]["income"][0] < 1e3


def test_masks(pipe, drawn):
    """Elements inside the mask are as they were, the others are sampled."""
    left, early = np.arange(8) < np.full((8, 1), 4), np.arange(16) < 6
    out = pipe({"image": drawn["image"], "sound": drawn["sound"][0]}, masks={"image": left, "sound": early}, n=2)
    for i, image in enumerate(out["image"]):
        pixels, given = np.asarray(image), np.asarray(drawn["image"][i // 2])
        assert (pixels[left] == given[left]).all()
        assert (pixels[~left] != given[~left]).any()
    for sound in out["sound"]:
        np.testing.assert_allclose(sound[:, early], drawn["sound"][0][:, early], atol=1e-4)
        assert (np.abs(sound - drawn["sound"][0])[:, ~early] > 1e-3).all()
    assert len({image.tobytes() for image in out["image"]}) == 6


def test_one_image_with_several_masks(pipe, drawn):
    left = np.arange(8) < np.full((8, 1), 4)
    out = pipe({"image": drawn["image"][0]}, masks={"image": [left, ~left, left | True]}, n=1)
    given = np.asarray(drawn["image"][0])
    same = [np.asarray(image) == given for image in out["image"]]
    assert same[0][left].all()
    assert not same[0][~left].all()
    assert same[1][~left].all()
    assert not same[1][left].all()
    assert same[2].all()


def test_noise_levels(pipe, drawn):
    """At time 1 nothing is left of a condition; a number for a modality holds for all of its processes."""
    full = as_lists(pipe({"image": drawn["image"], "row": drawn["row"]}, noise_levels={"image": 1.0, "row": 1.0}))
    assert all(full[m] != as_lists(drawn)[m] for m in ("image", "row"))
    parts = pipe.modalities["row"].encode_condition(pipe.codecs["row"], drawn["row"])
    half = pipe.sample({pipe.names["row"][part]: Condition(x, 0.5) for part, (x, _) in parts.items()}, batch_size=3)
    out = pipe({"row": drawn["row"]}, noise_levels={"row": 0.5})
    np.testing.assert_allclose(out["sound"], pipe.decode(half)["sound"], rtol=1e-6)


def test_steps_and_guidance(pipe):
    given = {"label": ["class 0", "class 1"]}
    plain = as_lists(pipe(given))
    assert as_lists(pipe(given, num_inference_steps=3, guidance_scale=1.0)) == plain  # the config's
    assert as_lists(pipe(given, num_inference_steps=5)) != plain
    assert as_lists(pipe(given, guidance_scale=3.0))["sound"] != plain["sound"]
    only_images = as_lists(pipe(given, guidance_scale={"image": 3.0}, num_inference_steps=1))
    one_step = as_lists(pipe(given, num_inference_steps=1))
    assert only_images["image"] != one_step["image"]
    assert only_images["sound"] == one_step["sound"]


def test_rows_known_as_a_whole_guide(pipe, drawn):
    """As captions do; rows known in part do not."""
    whole = as_lists(pipe({"row": drawn["row"]}))
    assert as_lists(pipe({"row": drawn["row"]}, guidance_scale={"sound": 4.0}))["sound"] != whole["sound"]
    assert pipe.guidance(True, 4.0).scale == 4.0


def test_configured_guidance_does_not_forbid_joint_samples(make_mixed):
    """Nothing guides anything in a joint sample of Gaussian modalities, and only Gaussian ones are guided."""
    pipe = Pipeline.from_pretrained(make_mixed())
    assert pipe.guidance(False).scale == 1.0
    settings = {"scale": {"label": 3.0}}
    config = pipe.config.model_copy(
        update={
            "sample": pipe.config.sample.model_copy(update={"guidance": type(pipe.config.sample.guidance)(**settings)})
        }
    )
    guided = Pipeline(config, pipe.codecs, pipe.space, pipe.net)
    assert guided.guidance(True).scale == {"label": 3.0}
    assert guided.guidance(False).scale == 1.0
    assert len(guided(n=2)["label"]) == 2
    with pytest.raises(ValueError, match="guidance needs a condition"):
        guided(n=2, guidance_scale={"label": 3.0})


@pytest.fixture(scope="module")
def rows_only(tmp_path_factory):
    """A model of rows alone whose random numbers are a Sobol sequence."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"age": rng.integers(18, 90, 64), "sex": rng.choice(["Female", "Male"], 64)})
    overrides = ["noise=sobol", "categorical.sampler.method=first_hitting", "train.steps=2", "sample.steps=3"]
    overrides = [o if "." in o and o.startswith(("train", "sample")) else f"modalities.row.{o}" for o in overrides]
    config = load_config("table/default", [*overrides, "train.batch=16", "train.save_every=2"])
    data = InMemory({"row": table}), InMemory({"row": table[:16]})
    out = tmp_path_factory.mktemp("rows")
    Trainer(config, out, "cpu", data=data, quiet=True).run()
    return Pipeline.from_pretrained(out)


def test_rows_alone_are_those_of_the_table_sampler(rows_only):
    """Its uniform numbers too; `TableSynthesizer.sample` is made of it."""
    assert rows_only.uniforms(5, 0, 7)
    pd.testing.assert_frame_equal(rows_only(n=7, seed=5)["row"], TableSampler(rows_only, seed=5).sample(7))


# Errors: one line that says what is wrong with what


EYE, SOUND = np.eye(8), np.zeros((2, 16))
FULL = {"image": EYE, "label": "class 1", "sound": SOUND, "row": {"age": 30, "sex": "Male", "income": 3}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"conditions": "a seven"}, ["conditions are a dictionary {modality: value}, got a str"]),
        ({"conditions": {"text": "x"}}, ["no modality 'text'; it has image, label, sound, row"]),
        ({"conditions": {"label": "class 9"}}, ["label: 'class 9' is not a class; there are class 0, class 1"]),
        ({"conditions": {"label": []}}, ["label: there are no values"]),
        ({"conditions": {"image": np.zeros((4, 4))}}, ["image: ", "(8, 8, 1), got (4, 4, 1)"]),
        ({"conditions": {"image": "gone.png"}}, ["image: image 'gone.png' not found"]),
        ({"conditions": {"image": object()}}, ["image: ", "not a readable image"]),
        ({"conditions": {"sound": np.zeros((3, 16))}}, ["sound: value 0 has shape (3, 16), the model takes (2, 16)"]),
        ({"conditions": {"sound": "hello"}}, ["sound: ", "'hello'"]),
        ({"conditions": {"row": {"agee": 3}}}, ["row: unknown column 'agee'; there are age, sex, income"]),
        ({"conditions": {"row": {"age": "old"}}}, ["row: column 'age': 'old' is not a number"]),
        ({"conditions": {"row": {"sex": "X"}}}, ["row: column 'sex' has no value 'X'; it has Female, Male"]),
        ({"conditions": {"row": {"age": (30, 40)}}}, ["row: column 'age'", "ranges are for TableSynthesizer"]),
        ({"conditions": {"row": 3}}, ["row: a row is a mapping {column: value}, got a int"]),
        ({"conditions": {"label": ["class 1"] * 3, "image": [EYE] * 2}}, ["equally many", "3 of label, 2 of image"]),
        ({"conditions": FULL}, ["every modality is a condition: there is nothing to generate"]),
        ({"conditions": FULL, "masks": {"image": EYE < 2}}, ["there is nothing to generate"]),
        ({"n": 0}, ["n must be at least 1, got 0"]),
        ({"num_inference_steps": 0}, ["steps must be at least 1, got 0"]),
        ({"guidance_scale": {"picture": 2}}, ["guidance: unknown modality 'picture'"]),
        ({"masks": {"image": EYE}}, ["masks: image: there is no condition of that modality"]),
        ({"conditions": {"image": EYE}, "masks": {"picture": EYE}}, ["masks: this model has no modality 'picture'"]),
        ({"conditions": {"image": EYE}, "masks": {"image": np.ones((4, 4))}}, ["image: ", "(4, 4)", "(8, 8)"]),
        ({"conditions": {"sound": SOUND}, "masks": {"sound": np.ones(5)}}, ["sound: ", "(5,)", "(2, 16)"]),
        ({"conditions": {"sound": SOUND}, "masks": {"sound": np.ones((3, 16))}}, ["sound: ", "(3, 16)", "(2, 16)"]),
        ({"conditions": {"image": [EYE] * 3}, "masks": {"image": [EYE] * 2}}, ["image: give as many masks as values"]),
        ({"conditions": {"label": "class 1"}, "masks": {"label": True}}, ["label: ", "it has no mask"]),
        ({"conditions": {"row": {"age": 30}}, "masks": {"row": True}}, ["row: cells that are left out", "no mask"]),
        ({"conditions": {"image": EYE}, "noise_levels": {"image": 2}}, ["noise_levels: image: ", "[0, 1], got 2"]),
        ({"conditions": {"image": EYE}, "noise_levels": {"image": "half"}}, ["noise_levels: image: 'half' is not a"]),
        ({"noise_levels": {"image": 0.5}}, ["noise_levels: image: there is no condition of that modality"]),
    ],
)
def test_errors(pipe, arguments, words):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        pipe(**arguments)
    message = str(error.value)
    for part in words:
        assert part in message


def test_a_modality_without_a_head_must_be_a_condition(make_mixed):
    pipe = Pipeline.from_pretrained(make_mixed(label={"stream": {"width": 16, "output": False}}))
    assert pipe.generated == ["image", "sound", "row"]
    for given in ({}, {"image": EYE}):
        with pytest.raises(ValueError, match=r"does not generate 'label': make it a condition, conditions=\{'label': "):
            pipe(given)
    assert pipe({"label": "class 2"})["label"] == ["class 2"]


# Saving and the hub


def test_saved_models_give_the_same_samples(pipe, drawn, tmp_path):
    """Also after they are saved again; what is written are weights, config, the codecs' files and the card."""
    assert pipe.save_pretrained(tmp_path / "one") == tmp_path / "one"
    found = {path.name for path in (tmp_path / "one").iterdir()}
    codecs = {"label.classes.json", "sound.statistics.json", "row.codec.json"}
    assert found == {"config.yaml", "model.safetensors", "README.md", *codecs}
    back = Pipeline.from_pretrained(tmp_path / "one")
    assert as_lists(back(n=3, seed=1)) == as_lists(drawn)
    assert back.config == pipe.config
    back.save_pretrained(tmp_path / "one")
    again = Pipeline.from_pretrained(str(tmp_path / "one"), weights="raw")
    assert as_lists(again(n=3, seed=1)) == as_lists(drawn)


def test_a_checkpoint_of_a_run_is_not_overwritten(pipe, mixed, tmp_path):
    folder = resolve(mixed)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a checkpoint of a training run"):
        pipe.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_folders_that_are_no_models(tmp_path, pipe):
    with pytest.raises(ValueError, match="no checkpoint at"):
        Pipeline.from_pretrained(tmp_path)
    folder = pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="weights must be ema or raw, got 'best'"):
        Pipeline.from_pretrained(folder, weights="best")
    (folder / "label.classes.json").unlink()
    with pytest.raises(ValueError, match="lacks a file of a codec: label"):
        Pipeline.from_pretrained(folder)


def test_the_model_card(pipe, tmp_path, monkeypatch):
    """Its facts are those of the model, and its example runs."""
    card = (pipe.save_pretrained(tmp_path / "mine") / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "anystate"
    assert {"multimodal", "columns", "image", "label", "series"} <= set(yaml.safe_load(head)["tags"])
    assert "| image | image | Gaussian | 1 × 8 × 8 |  | yes |" in text
    assert "| label | label | masked | 1 | 3 | yes |" in text
    assert "| row | columns | cat: masked | 1 | 2 | yes |" in text
    assert f"| parameters | {sum(p.numel() for p in pipe.net.parameters()):,} |" in text
    assert "| training | 1 steps of 8 examples, as configured |" in text
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(text.split("```python\n")[1].split("```")[0], values)
    assert {m: len(value) for m, value in values["out"].items()} == dict.fromkeys(NAMES, 8)


@pytest.fixture
def hub_folder(monkeypatch, pipe, tmp_path):
    """A hub of one model, someone/mixed, and what is uploaded to it, [(repo_id, private, files)]."""
    library = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    folder, uploads = pipe.save_pretrained(tmp_path / "hub"), []

    def snapshot_download(repo_id):
        if repo_id != "someone/mixed-v1.5":
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return str(folder)

    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    made = []
    monkeypatch.setattr(
        library, "create_repo", lambda repo_id, private, exist_ok: made.append(private) or f"https://hub/{repo_id}"
    )
    monkeypatch.setattr(
        library,
        "upload_folder",
        lambda folder_path, repo_id, commit_message: uploads.append(
            (repo_id, made[-1], {path.name: path.read_bytes() for path in folder_path.iterdir()})
        ),
    )
    return uploads


def test_models_on_the_hub(pipe, drawn, hub_folder, tmp_path):
    back = Pipeline.from_pretrained("someone/mixed-v1.5")
    assert as_lists(back(n=3, seed=1)) == as_lists(drawn)
    assert pipe.push_to_hub("me/mixed", private=True) == "https://hub/me/mixed"
    (uploaded,) = hub_folder
    assert uploaded[:2] == ("me/mixed", True)
    assert b"from_pretrained('me/mixed')" in uploaded[2]["README.md"]
    assert uploaded[2]["model.safetensors"] == (tmp_path / "hub/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"'someone/else' is neither a folder nor a model .* hub: 404 Client Error"):
        Pipeline.from_pretrained("someone/else")


def test_a_missing_run_is_not_looked_for_on_the_hub(hub_folder, tmp_path, monkeypatch):
    """runs/gone in a folder that has runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no checkpoint at 'runs/gone'"):
        hub.find_checkpoint("runs/gone")


def test_without_the_library_or_the_network(pipe, monkeypatch):
    library = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: Pipeline.from_pretrained("nobody/nothing"), lambda: pipe.push_to_hub("nobody/nothing")):
        with pytest.raises(ValueError, match=r"'nobody/nothing' .* Hugging Face hub: ") as error:
            call()
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Pipeline.from_pretrained("nobody/nothing"), lambda: pipe.push_to_hub("nobody/nothing")):
        with pytest.raises(ValueError, match="needs huggingface_hub: pip install huggingface_hub"):
            call()


def test_the_device_and_the_mode(pipe):
    assert pipe.device == torch.device("cpu")
    assert not pipe.net.training
