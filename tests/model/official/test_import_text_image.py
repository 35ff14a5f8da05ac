"""Import of official checkpoints: outputs equal to those of the golden network, and sampling from the result."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file, save_model

from anystate.configs.load import parse_config
from anystate.diffusion import Guidance
from anystate.model.build import build_codecs
from anystate.model.official import import_text_image as official
from anystate.model.official.text_image import load_official, to_official
from anystate.sample import sample
from anystate.sample.conditions import ConditionSource, read_conditions
from anystate.sample.pipeline import Pipeline, build_pipeline


@pytest.fixture(scope="module")
def state(golden):
    """The official state dict of the larger golden network."""
    return {key: value.clone() for key, value in golden.below("weights/").items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A small CLIP tokenizer of 31 tokens and a small autoencoder, saved by their libraries."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder = tmp_path_factory.mktemp("parts")
    symbols = [f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz012"]
    vocabulary = {token: i for i, token in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    tokenizer.save(str(folder / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            latent_channels=4,
            block_out_channels=(4, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=2,
        ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def options(parts):
    return ["--vae", parts / "vae", "--tokenizer", parts / "tokenizer.json"]


@pytest.fixture(scope="module")
def snapshot(state, tmp_path_factory):
    """A .pt as the official training writes it, with different EMA weights, optimizer and scheduler."""
    file = tmp_path_factory.mktemp("snapshot") / "snapshot.pt"
    ema = {key: value * 0.5 if key.endswith("ff.2.weight") else value for key, value in state.items()}
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], betas=[0.9, 0.9])
    parameter.sum().backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 1234, "base_lrs": [2e-4]}}
    torch.save({"model": state, "ema": ema, **rest}, file)
    return file


@pytest.fixture(scope="module")
def run(snapshot, options, tmp_path_factory, call):
    out = tmp_path_factory.mktemp("imported")
    assert call("import-official", snapshot, "--out", out, *options) == 0
    return out


def outputs(net, space, golden):
    x = {"text": golden["precond/tokens"], "image": golden["precond/x"]}
    t = {"text": golden["precond/t_disc"].double(), "image": golden["precond/t_cont"].double()}
    with torch.no_grad():
        out = space.evaluate(net, x, t)
    return out["image"], out["text"].values()


def test_outputs_of_the_imported_network_equal_the_golden_ones(golden, run, close):
    """The raw weights give the golden outputs, the EMA weights others."""
    pipeline = Pipeline.from_pretrained(run, "raw")
    image, _ = outputs(pipeline.net, golden.official_space(), golden)
    close(image, golden["precond/out_cont"], 1e-4, "image")
    ema, _ = outputs(Pipeline.from_pretrained(run).net, golden.official_space(), golden)
    assert (ema - image).abs().max() > 1e-3


def test_the_config_describes_the_official_processes(golden, run):
    pipeline, space = Pipeline.from_pretrained(run), golden.official_space(pad_id=30, attend_pads=False)
    assert list(pipeline.space) == list(space)
    text, image = pipeline.space["text"], pipeline.space["image"]
    same = ("shape", "states", "mask_id", "mask_logit", "pad_id", "attend_pads", "loss_on", "t_min")
    assert {k: getattr(text, k) for k in same} == {k: getattr(space["text"], k) for k in same}
    assert (image.shape, image.t_min, image.prediction_type) == (space["image"].shape, 1e-5, "epsilon")
    t = torch.rand(9, dtype=torch.float64)
    assert torch.equal(image.time_conditioning(t), space["image"].time_conditioning(t))
    assert torch.equal(image.schedule.integral(t), space["image"].schedule.integral(t))
    assert torch.equal(text.schedule.total(t), space["text"].schedule.total(t))
    assert {m: s.method for m, s in pipeline.samplers.items()} == {"text": None, "image": None}  # heun and τ-leaping
    assert run.joinpath("step_00001234").is_dir()
    assert (run / "step_00001234/text.tokenizer.json").is_file()


def test_the_report_lists_used_and_unused_tensors(state, options, tmp_path, capsys, call):
    """project_hidden adds layers that no official sampling uses."""
    extra = {"text_hidden_projection.0.weight": torch.ones(2, 2), "image_hidden_projection.2.bias": torch.ones(2)}
    torch.save({"ema": {**state, **extra}}, tmp_path / "a.pt")
    capsys.readouterr()
    assert call("import-official", tmp_path / "a.pt", "--out", tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert f"{len(state)} tensors used, 2 not (one set of weights" in printed
    report = json.loads(next((tmp_path / "run").glob("step_*/import.json")).read_text())
    assert sorted(report["used"]) == sorted(state)
    assert report["unused"] == sorted(extra)
    assert all(f"not used: {key}" in printed for key in extra)


def test_shared_tensors_with_one_of_two_names(golden, state, options, tmp_path, close, call):
    """`save_model`, which the hub's mixin calls, drops the second name of a shared tensor."""

    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for key, value in state.items():
                self.register_parameter(key.replace(".", "/"), torch.nn.Parameter(value))

    module = Shared()
    for key in state:
        if ".cond_linear_" in key:
            theirs = key.replace("cond_linear_", "to_post_branch_gammas_")
            theirs = theirs.rsplit(".", 1)[0] + ".2." + theirs.rsplit(".", 1)[1]
            module._parameters[theirs.replace(".", "/")] = module._parameters[key.replace(".", "/")]
    save_model(module, tmp_path / "slashes.safetensors")
    kept = {key.replace("/", "."): value for key, value in load_file(tmp_path / "slashes.safetensors").items()}
    assert len(kept) < len(state)
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(kept, folder / "model.safetensors")
    assert call("import-official", folder, "--out", tmp_path / "run", *options) == 0
    for weights in ("raw", "ema"):
        image, _ = outputs(Pipeline.from_pretrained(tmp_path / "run", weights).net, golden.official_space(), golden)
        close(image, golden["precond/out_cont"], 1e-4, "image")


def test_a_network_survives_export_and_import(run, options, tmp_path, call):
    """Another architecture: no single-stream text blocks, a deeper trunk, and half precision in the file."""
    raw = Pipeline.from_pretrained(run).config.model_dump(mode="json")
    raw["modalities"]["text"]["stream"].update(single_stream_depth=0, output=False, width=32, cond=32)
    raw["network"].update(depth=3, heads=2)
    config = parse_config(raw, "another architecture")
    pipeline = build_pipeline(config, build_codecs(config, run / "step_00001234"))
    for p in pipeline.net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs = {key: value.half() for key, value in to_official(pipeline.net).items()}
    torch.save(theirs, tmp_path / "bare.pt")
    assert call("import-official", tmp_path / "bare.pt", "--out", tmp_path / "run", *options) == 0
    back = Pipeline.from_pretrained(tmp_path / "run")
    assert list(back.net.head) == ["image"]
    for name, value in pipeline.net.half().float().state_dict().items():
        assert torch.equal(back.net.state_dict()[name], value), name


def test_sampling_an_imported_checkpoint(golden, state, run, tmp_path, call):
    """Files of the command line; the samples equal those of the official network loaded directly."""
    out = tmp_path / "out"
    options = ["--n", "2", "--steps", "3", "--device", "cpu", "--batch-size", "2", "--weights", "raw"]
    assert call("sample", run, "--condition", "text=a b c", *options, "--out", out) == 0
    assert (out / "text.txt").read_text() == "a b c\na b c\n"
    assert len(list((out / "image").glob("*.png"))) == 2
    pipeline = Pipeline.from_pretrained(run, "raw")
    conditions, guidance = {"text": pipeline.codecs["text"].encode(["a b c"] * 2)}, pipeline.guidance(True)
    assert conditions["text"][0].tolist() == [29, 0, 1, 2, 30, *[30] * 7]
    theirs = load_official(state)[0]
    space = golden.official_space(pad_id=30, attend_pads=False)
    args = {"conditions": conditions, "steps": 3, "guidance": guidance, "batch_size": 2}
    ours = sample(pipeline.net, pipeline.space, samplers=pipeline.samplers, **args)
    official_sample = sample(theirs, space, **args)
    assert torch.equal(ours["image"], official_sample["image"])
    assert guidance == Guidance(4.0, 1.0, (0.3, 0.8))
    written = np.asarray(Image.open(out / "image/000001.png"))
    assert np.array_equal(written, pipeline.codecs["image"].decode(official_sample["image"])[1])


def test_an_image_file_of_any_size_is_read_through_the_autoencoder(run, tmp_path, call):
    """Image → text: the image is cropped as in ADM, encoded, and decoded again for the output."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    options = ["--n", "2", "--steps", "3", "--device", "cpu", "--batch-size", "2", "--out", tmp_path / "out"]
    assert call("sample", run, "--condition", f"image={tmp_path}/x.png", *options) == 0
    codec = Pipeline.from_pretrained(run).codecs["image"]
    assert codec.image_size == 16
    latents = codec.read(tmp_path / "x.png")
    assert latents.shape == (1, 4, 8, 8)
    images = [np.asarray(Image.open(tmp_path / f"out/image/00000{i}.png")) for i in range(2)]
    for image in images:
        assert np.array_equal(image, codec.decode(latents)[0])
    captions = (tmp_path / "out/text.txt").read_text().splitlines()
    assert len(captions) == 2
    assert "▯" not in "".join(captions)


def test_prompts_of_clip_tokens(run, tmp_path):
    """A truncated caption keeps its end token; repeated ones fill the context."""
    (tmp_path / "p.json").write_text(json.dumps({"text": ["a b", "c d e f g h i j k l m n o"]}))
    pipeline = Pipeline.from_pretrained(run)

    def tokens(**options):
        return (
            read_conditions(pipeline, ConditionSource(prompts=tmp_path / "p.json", **options), None)
            .conditions["text"]
            .x.tolist()
        )

    assert tokens()[0] == [29, 0, 1, 30, *[30] * 8]
    assert tokens()[1] == [29, *range(2, 12), 30]
    assert tokens(context_limit=5) == [[29, 0, 1, 30, 30, *[30] * 7], [29, 2, 3, 4, 30, *[30] * 7]]
    assert tokens(repeat_text=10)[0] == [29, *[0, 1] * 5, 30]


class Harmful:
    def __reduce__(self):
        return (print, ("pickled code was run",))


def test_files_with_code_or_damage_are_refused(capsys, state, snapshot, tmp_path, refused):
    bad = {}
    torch.save({"ema": state, "extra": Harmful()}, tmp_path / "code.pt")
    bad["code.pt"] = "holds pickled code, which is never run"
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"ema": Harmful()}))
    bad["old.pt"] = "holds pickled code, which is never run"
    data = snapshot.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    bad |= dict.fromkeys(("cut.pt", "empty.pt", "text.pt"), "is truncated or not a .pt file")
    save_file({"a": torch.ones(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:500])
    bad["cut.safetensors"] = "is truncated or not a .safetensors file"
    torch.save({"optimizer": {}}, tmp_path / "weightless.pt")
    bad["weightless.pt"] = "neither 'model' nor 'ema'"
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    bad["tensor.pt"] = "holds Tensor, not an official snapshot"
    torch.save({"ema": {"blocks.0.weight": torch.ones(2)}}, tmp_path / "other.pt")
    bad["other.pt"] = "is it a text+image snapshot?"
    less = {key: value for key, value in state.items() if key != "image_final_layer.linear.bias"}
    torch.save({"ema": less}, tmp_path / "less.pt")
    bad["less.pt"] = "head.image.linear.bias"
    torch.save({"ema": {**state, "pos_embed": state["pos_embed"] + 1}}, tmp_path / "moved.pt")
    bad["moved.pt"] = "'pos_embed' is not the sine table"
    for name, message in bad.items():
        line = refused("import-official", tmp_path / name, "--out", tmp_path / "run")
        assert message in line, name
        assert not (tmp_path / "run").exists()
    assert "pickled code was run" not in capsys.readouterr().out


def test_table_checkpoints_through_the_same_command(golden_table, capsys, tmp_path, call, refused):
    """They need the data set that they were trained on; without it, the error names the option."""
    import pandas as pd
    import yaml

    state = golden_table("one_time").below("weights/")
    torch.save({"model": state, "ema": state}, tmp_path / "model_0029999.pt")
    line = refused("import-official", tmp_path / "model_0029999.pt", "--out", tmp_path / "run")
    assert "is of the official tabular code: add --table" in line
    random, n = np.random.default_rng(0), 300
    numbers = {name: random.standard_normal(n) for name in "abcd"}  # as many columns and values as the network has
    categories = {"target": 3, "seven": 7, "flag": 2}
    codes = {name: np.char.add("v", (np.arange(n) % k).astype(str)) for name, k in categories.items()}
    (tmp_path / "set").mkdir()
    pd.DataFrame({**numbers, **codes}).to_csv(tmp_path / "set/train.csv", index=False)
    roles = {"numerical": list("abcd"), "categorical": ["seven", "flag"], "target": "target", "task": "binclass"}
    (tmp_path / "set/schema.yaml").write_text(yaml.safe_dump(roles))
    options = ["--table", tmp_path / "set", "--out", tmp_path / "run"]
    assert call("import-official", tmp_path / "model_0029999.pt", *options) == 0
    assert "7 columns, sample with: anystate table sample" in " ".join(capsys.readouterr().out.split())
    rows = tmp_path / "rows.csv"
    assert call("table", "sample", tmp_path / "run", "-n", 5, "--steps", 3, "--out", rows, "--device", "cpu") == 0
    assert pd.read_csv(rows).shape == (5, 7)
    assert "belong to --table" in refused("import-official", "gone.pt", "--weights", "ema")


def test_missing_files(monkeypatch, run, snapshot, tmp_path, refused):
    assert "'gone.pt' not found" in refused("import-official", "gone.pt", "--out", tmp_path / "run")
    (tmp_path / "a.pt").touch(), (tmp_path / "b.pt").touch()
    assert "a.pt, b.pt" in refused("import-official", tmp_path, "--out", tmp_path / "run")
    assert "already holds a checkpoint" in refused("import-official", snapshot, "--out", run)
    requests = []

    def offline(repository, file):
        requests.append((repository, file))
        raise OSError("no\nroute to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    line = refused("import-official", "someone/some-model", "--out", tmp_path / "run")
    assert "not available on the Hugging Face hub: no route to host" in line
    assert requests == [("someone/some-model", "model.safetensors")]


def test_the_published_file_is_downloaded_from_the_hub(monkeypatch, golden, state, options, tmp_path, close, call):
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "model.safetensors"))
    assert call("import-official", "someone/some-model", "--out", tmp_path / "run", *options) == 0
    image, _ = outputs(Pipeline.from_pretrained(tmp_path / "run").net, golden.official_space(), golden)
    close(image, golden["precond/out_cont"], 1e-4, "image")


def test_an_unavailable_tokenizer_is_reported(state, parts, tmp_path):
    """The weights are imported without it: the tokenizer can be given later."""
    save_file(state, tmp_path / "model.safetensors")
    report = official.import_official(
        str(tmp_path / "model.safetensors"), tmp_path / "run", str(parts / "vae"), str(tmp_path / "gone.json")
    )
    assert report.lines()[-2].startswith("the tokenizer is not in the checkpoint")
    assert not list(report.folder.glob("*.tokenizer.json"))
