"""Pictures ↔ latents of a variational autoencoder (`diffusers.AutoencoderKL`)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK = 16  # pictures the autoencoder works on at once


@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """RGB pictures ↔ float32 (N, channels, size, size), the latents of a variational autoencoder times `scale`.

    Args:
        vae: a folder that `AutoencoderKL.save_pretrained` wrote, or a hub id such as stabilityai/sd-vae-ft-mse.
        scale: factor that gives the latents about unit variance; 0.18215 for that one.
        channels, size: of the latents.
        device: where the autoencoder works; default a GPU if there is one. It is loaded at first use.
    """

    vae: str
    scale: float
    channels: int
    size: int
    device: str | None = dataclasses.field(default=None, compare=False)

    @property
    def picture(self) -> int:
        """Side of the pictures in pixels."""
        return self.size * self.factor

    @functools.cached_property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    @functools.cached_property
    def net(self):
        """The autoencoder.

        Raises:
            ValueError: diffusers is missing, the weights cannot be had, or have another number of channels.
        """
        net = load_vae(self.vae, self.device)
        if net.config.latent_channels != self.channels:
            raise ValueError(
                f"the autoencoder {self.vae} has {net.config.latent_channels} latent channels, not {self.channels}"
            )
        return net

    @torch.no_grad()
    def moments(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 (N, P, P, 3) with P = `picture` → mean and standard deviation of the latents, (N, C, S, S), unscaled.

        Raises:
            ValueError: pictures of another shape or type.
        """
        pictures = np.asarray(pictures)
        want = (self.picture, self.picture, 3)
        if pictures.shape[1:] != want or pictures.dtype != np.uint8:
            got = f"{tuple(pictures.shape[1:])} of {pictures.dtype}"
            raise ValueError(f"expected pictures of height, width, channels {want} of uint8, got {got}")
        means, stds = [], []
        for part in np.array_split(pictures, range(CHUNK, len(pictures), CHUNK)):
            x = torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2))).to(self.net.device, self.net.dtype)
            posterior = self.net.encode(x / 127.5 - 1.0).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
        return torch.cat(means), torch.cat(stds)

    def encode(self, pictures: np.ndarray) -> Tensor:
        """The mean latents of uint8 (N, P, P, 3) pictures, scaled."""
        return self.moments(pictures)[0] * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        """(N, C, S, S) → uint8 (N, P, P, 3)."""
        parts = []
        for part in x.split(CHUNK):
            pixels = self.net.decode(part.to(self.net.device, self.net.dtype) / self.scale).sample.float().clamp(-1, 1)
            parts.append(((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def read(self, path: str | Path) -> Tensor:
        """(1, C, S, S) of a picture file of any size, cropped to its centre.

        Raises:
            ValueError: not a readable picture.
        """
        return self.encode(center_crop(read_picture(path, 3), self.picture)[None])


@functools.lru_cache(maxsize=2)
def load_vae(name: str, device: str | None = None):
    """An `AutoencoderKL`, ready to use.

    Raises:
        ValueError: diffusers is missing or the weights cannot be had.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("latents need diffusers: pip install anystate[latents]") from None
    try:
        net = AutoencoderKL.from_pretrained(name)
    except Exception as error:  # the hub, the disk and the library each raise kinds of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"autoencoder {name!r} is neither a folder with an AutoencoderKL nor one the hub gives out: {reason}"
        ) from None
    return net.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)


def read_picture(source, channels: int) -> np.ndarray:
    """uint8 (H, W, channels) of a picture file (a path or an open file) of any format that Pillow reads.

    Raises:
        ValueError: not found, not a picture, or cut off.
    """
    from PIL import Image

    try:
        with Image.open(source) as picture:
            pixels = np.asarray(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    except FileNotFoundError:
        raise ValueError(f"picture {str(source)!r} not found") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's kinds of broken
        raise ValueError(f"{source}: not a readable picture ({error})") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre of a uint8 picture (H, W, C) as (size, size, C); unchanged if it has that size.

    The rule of ADM (Dhariwal and Nichol, arXiv 2105.05233): halve with a box filter while the short side is at least
    twice the target, bring it to the target with a bicubic filter, cut the middle out.
    """
    from PIL import Image

    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        return pixels
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    cut = np.asarray(picture)[top : top + size, left : left + size]
    return cut[..., None] if channels == 1 else cut
