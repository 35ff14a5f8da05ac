"""Latents of a small autoencoder of the real class, saved and loaded like the real one; ADM's centre crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from anystate.model.codecs.vae import LatentCodec, center_crop, read_picture

SCALE = 0.5


@pytest.fixture
def codec(vae):
    return LatentCodec(str(vae), SCALE, 4, 8, "cpu")


PICTURES = np.random.default_rng(0).integers(0, 256, (19, 16, 16, 3), dtype=np.uint8)


def loaded(vae):
    import diffusers

    return diffusers.AutoencoderKL.from_pretrained(vae).eval()


def test_moments_and_latents_are_those_of_the_autoencoder(vae, codec):
    with torch.no_grad():
        posterior = loaded(vae).encode(torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist
    mean, std = codec.moments(PICTURES)
    assert mean.shape == std.shape == (19, 4, 8, 8)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, posterior.std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.encode(PICTURES), posterior.mean * SCALE, atol=1e-5, rtol=1e-4)


def test_decoding_divides_by_the_scale(vae, codec):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ((loaded(vae).decode(x / SCALE).sample.clamp(-1, 1) + 1) * 127.5).round()
    pictures = codec.decode(x)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, 16, 16, 3)
    assert np.abs(pictures - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_reads_a_picture_of_any_size(codec, tmp_path):
    Image.fromarray(PICTURES[0]).resize((40, 24)).save(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert torch.equal(codec.read(tmp_path / "x.png"), codec.encode(center_crop(pixels, 16)[None]))


def test_equal_codecs_are_equal_and_load_nothing():
    assert LatentCodec("a", 1.0, 4, 8, "cpu") == LatentCodec("a", 1.0, 4, 8)
    assert LatentCodec("a", 1.0, 4, 8) != LatentCodec("b", 1.0, 4, 8)


@pytest.mark.parametrize(
    "pictures", [PICTURES[:, :8], PICTURES[..., :1], PICTURES.astype(np.float32)], ids=["size", "channels", "dtype"]
)
def test_pictures_that_do_not_fit(codec, pictures):
    with pytest.raises(ValueError, match=r"expected pictures of height, width, channels \(16, 16, 3\) of uint8"):
        codec.moments(pictures)


def test_channels_that_do_not_fit(vae):
    with pytest.raises(ValueError, match="has 4 latent channels, not 8"):
        LatentCodec(str(vae), SCALE, 8, 8, "cpu").encode(PICTURES)


def test_no_autoencoder_there(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"autoencoder '.*' is neither a folder") as error:
        LatentCodec(str(tmp_path), SCALE, 4, 8).encode(PICTURES)
    assert "\n" not in str(error.value)


# Centre crop


def test_a_picture_of_the_right_size_is_untouched():
    assert np.array_equal(center_crop(PICTURES[0], 16), PICTURES[0])


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (33, 47), (17, 16), (5, 9)])
def test_crop_keeps_the_middle(shape):
    """A picture that rises from 0 to 255 across its height keeps 127.5 in its middle, and its mirror image's crop is
    the mirror image of its crop up to the pixel that does not divide."""
    height, width = shape
    pixels = np.broadcast_to(np.linspace(0, 255, height)[:, None, None], (height, width, 3)).astype(np.uint8)
    crop = center_crop(pixels, 16)
    assert crop.shape == (16, 16, 3)
    assert abs(crop.mean() - 127.5) < 10
    assert (np.diff(crop[:, 0, 0].astype(int)) >= -1).all()


def test_halving_averages_boxes():
    """Exactly twice the size: each pixel is the mean of four, up to rounding twice; no other filter has that."""
    crop = center_crop(PICTURES[0], 8)
    boxes = PICTURES[0].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(crop - boxes).max() <= 1


def test_one_channel():
    assert center_crop(PICTURES[0][..., :1], 8).shape == (8, 8, 1)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_broken_pictures(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable picture"):
        read_picture(tmp_path / "x.png", 3)
