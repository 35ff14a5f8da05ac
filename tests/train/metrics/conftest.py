"""A small data set like emoji: shapes in five skin tones, some with two, some with a man's or woman's form."""

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


def picture(shape: int, left, right, hat: bool) -> np.ndarray:
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
    """(caption, base, modifier, kind, picture) of every pair."""
    out = []
    yellow = (255, 204, 77)
    for shape, name in enumerate(("ear", "nose", "person running", "person bowing", "kiss")):
        out.append((name, name, "", "plain", picture(shape, yellow, yellow, False)))
        for tone, colour in TONES.items():
            out.append((f"{name} {tone} skin tone", name, tone, "tone", picture(shape, colour, colour, False)))
        if name.startswith("person"):
            woman = name.replace("person", "woman")
            out.append((woman, name, "woman", "gender", picture(shape, yellow, yellow, True)))
            for tone, colour in TONES.items():
                out.append((f"{woman} {tone} skin tone", woman, tone, "tone", picture(shape, colour, colour, True)))
        if name == "kiss":
            for a, left in TONES.items():
                for b, right in TONES.items():
                    if a != b:
                        two = f"{a} and {b}"
                        out.append((f"{name} {two} skin", name, two, "two-tone", picture(shape, left, right, False)))
    return out


@pytest.fixture(scope="session")
def tones_npz(tmp_path_factory):
    """That set as an .npz with emoji's arrays; every seventh toned pair is held out."""
    captions, base, modifier, kind, images = (list(column) for column in zip(*rows(), strict=True))
    split = ["test" if k in ("tone", "two-tone") and i % 7 == 3 else "train" for i, k in enumerate(kind)]
    path = tmp_path_factory.mktemp("tones") / "tones.npz"
    arrays = {"captions": captions, "base": base, "modifier": modifier, "kind": kind, "split": split}
    np.savez(path, images=np.stack(images), **{name: np.array(values) for name, values in arrays.items()})
    return path


@pytest.fixture(scope="session")
def tones(tones_npz):
    """(training, held-out) pairs of that set."""
    from anystate.model.codecs import CharCodec, PixelCodec
    from anystate.train.data.pairs import load_npz

    codec = CharCodec(" -abcdefghijklmnopqrstuvwxyz", 40)
    return load_npz(str(tones_npz), PixelCodec(3, SIZE).encode, codec.encode, 0.2, 0)
