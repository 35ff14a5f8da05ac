"""A small data set like emoji: shapes in five skin tones, some with two tones, some in a woman's form."""

from __future__ import annotations

import numpy as np
import pytest

TONES = {
    "light": (247, 222, 206),
    "medium-light": (243, 210, 162),
    "medium": (213, 171, 136),
    "medium-dark": (175, 126, 87),
    "dark": (124, 83, 62),
}
SIZE = 12
THREE = """
name: three
data: {source: digits}
modalities:
  image: {kind: image, channels: 1, size: 8, pixel_max: 16, stream: {width: 16, patch: 4}}
  label: {kind: label, stream: {width: 16}}
  text: {kind: text, alphabet: " 0123456789abdefghimnorstuvwxz", length: 12, stream: {width: 16}}
network: {depth: 1, heads: 2, head_dim: 8}
times: {subset_prob: 0.3}
train: {steps: 4, batch: 16, warmup_steps: 2, log_every: 1}
sample: {steps: 3, batch_size: 8}
"""


def shape_image(shape: int, left, right, hat: bool) -> np.ndarray:
    """A blob of shape number `shape` on white, coloured left and right, with a blue hat or not."""
    rng = np.random.default_rng(shape)
    inside = rng.random((SIZE, SIZE)) < 0.6
    inside[:3] = False
    x = np.full((SIZE, SIZE, 3), 255, np.uint8)
    x[:, : SIZE // 2][inside[:, : SIZE // 2]] = left
    x[:, SIZE // 2 :][inside[:, SIZE // 2 :]] = right
    if hat:
        x[:2, 3:9] = (40, 80, 200)
    return x


def rows():
    """(caption, base, modifier, kind, image) of every pair."""
    out = []
    yellow = (255, 204, 77)
    for shape, name in enumerate(("ear", "nose", "person running", "person bowing", "kiss", "hug")):
        out.append((name, name, "", "plain", shape_image(shape, yellow, yellow, False)))
        for tone, colour in TONES.items():
            out.append((f"{name} {tone} skin tone", name, tone, "tone", shape_image(shape, colour, colour, False)))
        if name.startswith("person"):
            woman = name.replace("person", "woman")
            out.append((woman, name, "woman", "gender", shape_image(shape, yellow, yellow, True)))
            for tone, colour in TONES.items():
                out.append((f"{woman} {tone} skin tone", woman, tone, "tone", shape_image(shape, colour, colour, True)))
        if name in ("kiss", "hug"):
            for a, left in TONES.items():
                for b, right in TONES.items():
                    if a != b:
                        two = f"{a} and {b}"
                        out.append(
                            (f"{name} {two} skin", name, two, "two-tone", shape_image(shape, left, right, False))
                        )
    return out


@pytest.fixture(scope="session")
def tones_npz(tmp_path_factory):
    """This data set as an .npz with the arrays of emoji. Every seventh pair with tones is held out,
    but none of the hugs, so that every ordered pair of tones is in the training part."""
    captions, base, modifier, kind, images = (list(column) for column in zip(*rows(), strict=True))
    held_out = [
        (k == "tone" or (k == "two-tone" and b == "kiss")) and i % 7 == 3
        for i, (k, b) in enumerate(zip(kind, base, strict=True))
    ]
    split = ["test" if out else "train" for out in held_out]
    path = tmp_path_factory.mktemp("tones") / "tones.npz"
    arrays = {"captions": captions, "base": base, "modifier": modifier, "kind": kind, "split": split}
    np.savez(path, images=np.stack(images), **{name: np.array(values) for name, values in arrays.items()})
    return path


@pytest.fixture(scope="session")
def tones_overrides(tones_npz):
    """Settings of the config digits for this data set."""
    return [
        f"data.source={tones_npz}",
        "modalities.image.channels=3",
        f"modalities.image.size={SIZE}",
        "modalities.image.pixel_max=255",
        "modalities.text.alphabet=' -abcdefghijklmnopqrstuvwxyz'",
        "modalities.text.length=40",
    ]


@pytest.fixture(scope="session")
def tones(tones_overrides):
    """(training, held-out) examples of this data set."""
    from anystate.configs.load import load_config
    from anystate.model.build import build_codecs
    from anystate.train.data.load import load_data

    config = load_config("digits", tones_overrides)
    return load_data(config, build_codecs(config))


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """three("train.steps=6", …) → Config of a small model of images, classes and captions of digits."""
    from anystate.configs.load import load_config

    path = tmp_path_factory.mktemp("three") / "three.yaml"
    path.write_text(THREE)
    return lambda *overrides: load_config(path, list(overrides))


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory):
    """Folder of a small random CLIPModel with its processor, as `save_pretrained` writes it."""
    import torch

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-'"
    symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(symbols), "max_position_embeddings": 32, "eos_token_id": len(symbols) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **sizes}, vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.CLIPModel(config)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokens = transformers.CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    folder = tmp_path_factory.mktemp("clip")
    net.save_pretrained(folder)
    transformers.CLIPProcessor(processor, tokens).save_pretrained(folder)
    return folder
