"""Character and pixel codecs: round trips, and errors for invalid input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from anystate.model.codecs.characters import PAD, CharCodec
from anystate.model.codecs.pixels import PixelCodec

TEXT = CharCodec("abc ", 6)
GREY = PixelCodec(1, 4, 16.0)


def test_captions_round_trip():
    captions = ["", "a", "cab a", "abcabc"]
    tokens = TEXT.encode(captions)
    assert tokens.shape == (4, 6)
    assert tokens.dtype == torch.int64
    assert (tokens[0] == PAD).all()
    assert TEXT.decode(tokens) == captions


def test_decoding_shows_inner_pads_and_masked_positions():
    tokens = torch.tensor([[1, PAD, 2, TEXT.states, PAD, PAD]])
    assert TEXT.decode(tokens) == ["a_b▯"]


@pytest.mark.parametrize(("caption", "message"), [("abcabca", "7 characters"), ("abz", "'z'")])
def test_invalid_captions(caption, message):
    with pytest.raises(ValueError, match=message):
        TEXT.encode([caption])


def test_pixels_round_trip():
    images = np.arange(48).reshape(3, 4, 4) % 17
    x = GREY.encode(images)
    assert x.shape == (3, 1, 4, 4)
    assert x.min() == -1.0
    assert x.max() == 1.0
    back = GREY.decode(x)
    assert back.dtype == np.uint8
    assert np.abs(back[..., 0] - images * 255 / 16).max() <= 0.5


def test_colour_keeps_its_channels_apart():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    images[0, 1, 2] = 255, 0, 128
    codec = PixelCodec(3, 4)
    x = codec.encode(images)
    assert x[0, :, 1, 2].tolist() == pytest.approx([1.0, -1.0, 128 / 127.5 - 1.0], abs=1e-6)
    assert np.array_equal(codec.decode(x), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 5, 4)), r"\(5, 4, 1\)"),
        (np.zeros((2, 4, 4, 3)), r"\(4, 4, 3\)"),
        (np.full((1, 4, 4), 17), r"\[0, 16\]"),
        (np.full((1, 4, 4), -1), r"\[0, 16\]"),
        (np.full((1, 4, 4), np.nan), r"\[0, 16\]"),
    ],
)
def test_invalid_images(images, message):
    with pytest.raises(ValueError, match=message):
        GREY.encode(images)


def test_reads_an_image_file(tmp_path):
    pixels = (np.arange(16).reshape(4, 4) * 17).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.array_equal(GREY.decode(GREY.read(tmp_path / "x.png"))[0, ..., 0], pixels)
