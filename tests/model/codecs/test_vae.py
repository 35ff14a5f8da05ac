"""Latents of a small `AutoencoderKL` saved to disk, and the centre crop of ADM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from anystate.model.codecs.vae import LatentCodec, center_crop, read_image

SCALE = 0.5


@pytest.fixture
def codec(vae):
    return LatentCodec(str(vae), SCALE, 4, 8, "cpu")


IMAGES = np.random.default_rng(0).integers(0, 256, (19, 16, 16, 3), dtype=np.uint8)


def loaded(vae):
    import diffusers

    return diffusers.AutoencoderKL.from_pretrained(vae).eval()


def test_moments_and_latents_are_those_of_the_autoencoder(vae, codec):
    with torch.no_grad():
        posterior = loaded(vae).encode(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist
    mean, std = codec.moments(IMAGES)
    assert mean.shape == std.shape == (19, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, posterior.std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.encode(IMAGES), posterior.mean * SCALE, atol=1e-5, rtol=1e-4)


def test_decoding_divides_by_the_scale(vae, codec):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ((loaded(vae).decode(x / SCALE).sample.clamp(-1, 1) + 1) * 127.5).round()
    images = codec.decode(x)
    assert images.dtype == np.uint8
    assert images.shape == (3, 16, 16, 3)
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_reads_an_image_of_any_size(codec, tmp_path):
    Image.fromarray(IMAGES[0]).resize((40, 24)).save(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert torch.equal(codec.read(tmp_path / "x.png"), codec.encode(center_crop(pixels, 16)[None]))


def test_equal_codecs_are_equal_and_load_nothing():
    assert LatentCodec("a", 1.0, 4, 8, "cpu") == LatentCodec("a", 1.0, 4, 8)
    assert LatentCodec("a", 1.0, 4, 8) != LatentCodec("b", 1.0, 4, 8)


@pytest.mark.parametrize(
    "images", [IMAGES[:, :8], IMAGES[..., :1], IMAGES.astype(np.float32)], ids=["size", "channels", "dtype"]
)
def test_invalid_images(codec, images):
    with pytest.raises(ValueError, match=r"expected images of height, width, channels \(16, 16, 3\) of uint8"):
        codec.moments(images)


def test_wrong_number_of_channels(vae):
    with pytest.raises(ValueError, match="has 4 latent channels, not 8"):
        LatentCodec(str(vae), SCALE, 8, 8, "cpu").encode(IMAGES)


def test_missing_autoencoder(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"autoencoder '.*' is neither a folder") as error:
        LatentCodec(str(tmp_path), SCALE, 4, 8).encode(IMAGES)
    assert "\n" not in str(error.value)


# Centre crop


def test_an_image_of_the_right_size_is_unchanged():
    assert np.array_equal(center_crop(IMAGES[0], 16), IMAGES[0])


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (33, 47), (17, 16), (5, 9)])
def test_crop_keeps_the_middle(shape):
    """The crop of an image that rises from 0 to 255 across its height rises, too, with a mean of about 127.5."""
    height, width = shape
    pixels = np.broadcast_to(np.linspace(0, 255, height)[:, None, None], (height, width, 3)).astype(np.uint8)
    crop = center_crop(pixels, 16)
    assert crop.shape == (16, 16, 3)
    assert abs(crop.mean() - 127.5) < 10
    assert (np.diff(crop[:, 0, 0].astype(int)) >= -1).all()


def test_halving_averages_boxes():
    """At exactly twice the size, each pixel is the mean of four, up to rounding twice."""
    crop = center_crop(IMAGES[0], 8)
    boxes = IMAGES[0].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(crop - boxes).max() <= 1


def test_one_channel():
    assert center_crop(IMAGES[0][..., :1], 8).shape == (8, 8, 1)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_broken_images(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(tmp_path / "x.png", 3)
