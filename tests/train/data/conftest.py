"""A small packed data set in which every image encodes its row number."""

from __future__ import annotations

import numpy as np
import pytest

from anystate.model.codecs.base import Codec
from anystate.model.codecs.characters import CharCodec
from anystate.model.codecs.pixels import PixelCodec
from anystate.model.codecs.subwords import TokenizerCodec
from anystate.model.codecs.vae import LatentCodec
from anystate.train.data.packed.manifest import Manifest
from anystate.train.data.packing.image_text import Settings
from anystate.train.data.packing.open import open_source
from anystate.train.data.packing.pack import pack

N, TEST = 70, 10
ADJECTIVES = ("red", "green", "blue", "old", "new", "small", "big")


def caption(row: int) -> str:
    return f"{ADJECTIVES[row % 7]} thing {row}"


def arrays(n: int = N, size: int = 4) -> dict[str, np.ndarray]:
    """Images whose first channel is the row number, and whose other channels are its square mod 251."""
    rows = np.arange(n)
    images = np.stack([rows, rows**2 % 251, rows**2 % 251], -1).astype(np.uint8)
    images = np.broadcast_to(images[:, None, None], (n, size, size, 3))
    return {
        "images": np.ascontiguousarray(images),
        "captions": np.array([caption(r) for r in range(n)]),
        "split": np.array(["test" if r >= n - TEST else "train" for r in range(n)]),
        "word": np.array([ADJECTIVES[r % 7] for r in range(n)]),
        "number": rows,
    }


def codecs_of(folder) -> dict[str, Codec]:
    """The codecs of a packed data set of images and captions."""
    manifest = Manifest.load(folder)
    image, text = (dict(manifest.modalities[m].codec) for m in ("image", "text"))
    side = image["channels"], image["size"]
    latents = image["kind"] == "latents"
    codecs = {"image": LatentCodec("none", image["scale"], *side) if latents else PixelCodec(*side, image["pixel_max"])}
    if text["kind"] == "characters":
        return {**codecs, "text": CharCodec(text["alphabet"], text["length"])}
    place = folder / manifest.modalities["text"].files["tokenizer.json"]
    del text["kind"]
    return {**codecs, "text": TokenizerCodec(place, **text)}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "things.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="session")
def packed(source, tmp_path_factory):
    """Folder of 60 training samples in four shards and 10 held-out ones; tests must not change it."""
    out = tmp_path_factory.mktemp("packed") / "set"
    pack(open_source(str(source)), out, Settings(shard_size=16))
    return out
