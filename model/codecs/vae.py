"""Images ↔ latents of a variational autoencoder (`diffusers.AutoencoderKL`)."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import ArraySpec, Codec, Parts, Stored

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from diffusers import AutoencoderKL

BATCH = 16  # images per call of the autoencoder


@dataclasses.dataclass(frozen=True)
class LatentCodec(Codec):
    """RGB images ↔ float32 (N, channels, size, size), the latents of a variational autoencoder times `scale`.

    Args:
        vae: a folder written by `AutoencoderKL.save_pretrained`, or a hub id.
        scale: factor that gives the latents about unit variance.
        channels, size: of the latents.
        device: of the autoencoder, which is loaded at first use; default a GPU if there is one.
    """

    draws: ClassVar[bool] = True

    vae: str
    scale: float
    channels: int
    size: int
    device: torch.device | str | None = dataclasses.field(default=None, compare=False)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.size * self.factor

    @functools.cached_property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    @functools.cached_property
    def net(self) -> AutoencoderKL:
        """The autoencoder.

        Raises:
            ValueError: diffusers is missing, or the weights cannot be loaded or have another number of channels.
        """
        net = load_vae(self.vae, self.device)
        if net.config.latent_channels != self.channels:
            raise ValueError(
                f"the autoencoder {self.vae} has {net.config.latent_channels} latent channels, not {self.channels}"
            )
        return net

    @torch.no_grad()
    def moments(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents, each (N, C, S, S), of uint8 images (N, P, P, 3).

        P is `image_size`.

        Raises:
            ValueError: images of another shape or type.
        """
        images = np.asarray(images)
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected or images.dtype != np.uint8:
            got = f"{tuple(images.shape[1:])} of {images.dtype}"
            raise ValueError(f"expected images of height, width, channels {expected} of uint8, got {got}")
        means, stds = [], []
        for part in np.array_split(images, range(BATCH, len(images), BATCH)):
            x = torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2))).to(self.net.device, self.net.dtype)
            posterior = self.net.encode(x / 127.5 - 1.0).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
        return torch.cat(means), torch.cat(stds)

    def encode(self, values: np.ndarray | Sequence) -> Tensor:
        """The scaled mean latents of uint8 images (N, P, P, 3); others, and files, are cropped to their centre."""
        if not isinstance(values, np.ndarray):
            images = [value if isinstance(value, np.ndarray) else read_image(value, 3) for value in values]
            values = np.stack([center_crop(image, self.image_size) for image in images])
        return self.moments(values)[0] * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> np.ndarray:
        """uint8 images (N, P, P, 3) from scaled latents (N, C, S, S)."""
        parts = []
        for part in x.split(BATCH):
            pixels = self.net.decode(part.to(self.net.device, self.net.dtype) / self.scale).sample.float().clamp(-1, 1)
            parts.append(((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def ready(self, device: torch.device | str | None = None) -> Self:
        codec = dataclasses.replace(self, device=device or self.device)
        _ = codec.net
        return codec

    def prepare(self, value: Any) -> np.ndarray:
        """uint8 (P, P, 3), cropped to its centre."""
        return prepare_image(value, 3, self.image_size)

    def store(self, values: Sequence[np.ndarray], seed: int = 0) -> Stored:
        """fp16 (N, 2C, S, S): mean and standard deviation of the unscaled latents."""
        return {"": torch.cat(self.moments(np.stack(values)), 1).numpy().astype(np.float16)}

    def restore(self, stored: Stored, seeds: list[int] | None = None) -> Parts:
        """scale · (mean + std · ε)."""
        mean, std = torch.from_numpy(stored[""]).unflatten(1, (2, -1)).unbind(1)
        if seeds is None:
            return {"": mean.float() * self.scale}
        return {"": torch.addcmul(mean.float(), noise(seeds, mean.shape[1:]), std.float()).mul_(self.scale)}

    def specs(self, diffused: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        return {"": ArraySpec((2 * self.channels, self.size, self.size), "float16")}

    def settings(self) -> dict[str, Any]:
        return {"kind": "latents", "channels": self.channels, "size": self.size, "scale": self.scale}

    def read(self, path: str | Path) -> Tensor:
        """(1, C, S, S) from an image file of any size, cropped to its centre.

        Raises:
            ValueError: not a readable image.
        """
        return self.encode(center_crop(read_image(path, 3), self.image_size)[None])

    def read_mask(self, path: str | Path) -> Tensor:
        """(1, 1, size, size) bool from a black and white image of the pixels' size.

        True for the latents all of whose pixels are white.
        """
        pixels = read_image(path, 1)
        check_size(path, pixels, self.image_size)
        return self.encode_mask([pixels[..., 0] > 127])

    def encode_mask(self, masks: Sequence) -> Tensor:
        """(N, 1, size, size) bool of N masks of the pixels' size."""
        blocks = stack_masks(masks, self.image_size).view(-1, self.size, self.factor, self.size, self.factor)
        return blocks.all(4).all(2)[:, None]


@functools.lru_cache(maxsize=2)
def load_vae(name: str, device: torch.device | str | None = None) -> AutoencoderKL:
    """A frozen `AutoencoderKL` in evaluation mode.

    Raises:
        ValueError: diffusers is missing or the weights cannot be loaded.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("latents need diffusers: pip install anystate[latents]") from None
    try:
        net = AutoencoderKL.from_pretrained(name)
    except Exception as error:  # the hub, the disk and the library raise their own exception types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"autoencoder {name!r} is neither a folder with an AutoencoderKL nor available on the hub: {reason}"
        ) from None
    return net.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)


def read_image(source: Any, channels: int) -> np.ndarray:
    """uint8 (H, W, channels) from an image file (a path, an open file or bytes), or from a Pillow image.

    Raises:
        ValueError: not found, not an image, or truncated.
    """
    from PIL import Image

    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if isinstance(source, Image.Image):
        pixels = np.asarray(source.convert(mode))
        return pixels[..., None] if pixels.ndim == 2 else pixels
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with Image.open(source) as image:
            pixels = np.asarray(image.convert(mode))
    except FileNotFoundError:
        raise ValueError(f"image {str(source)!r} not found") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        AttributeError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's errors for bad files
        raise ValueError(f"{source}: not a readable image ({error})") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def prepare_image(value: Any, channels: int, size: int | None = None) -> np.ndarray:
    """An image as (H, W, channels), or as (size, size, channels), resized and cropped to its centre.

    value: an array (H, W[, channels]), or anything that `read_image` takes, of which uint8 results.

    Raises:
        ValueError: not an image, empty, or with another number of channels.
    """
    if isinstance(value, np.ndarray):
        pixels = value[..., None] if value.ndim == 2 else value
    else:
        try:
            pixels = read_image(value, channels)
        except ValueError:
            raise ValueError("not a readable image") from None
    if pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise ValueError(f"an image of shape {pixels.shape}, not (height, width, {channels})")
    if size is None:
        return pixels
    if pixels.dtype != np.uint8 and pixels.shape[:2] != (size, size):
        raise ValueError(f"an image of {pixels.dtype} with shape {pixels.shape}: only uint8 can be resized to {size}")
    return center_crop(pixels, size)


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """float32 standard normals (len(seeds), *shape); row i is a function of seeds[i] alone."""
    out, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return out


def check_size(path: str | Path, pixels: np.ndarray, size: int) -> None:
    """ValueError unless pixels (height, width, channels) are `size` high and wide."""
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        raise ValueError(f"{path}: the model takes {size}x{size} images, this one is {width}x{height}")


def stack_masks(masks: Sequence, size: int) -> Tensor:
    """(N, size, size) bool.

    Raises:
        ValueError: a mask of another shape.
    """
    arrays = [np.asarray(mask) for mask in masks]
    if wrong := [a.shape for a in arrays if a.shape != (size, size)]:
        raise ValueError(f"a mask has shape {wrong[0]}, the model takes {(size, size)}")
    return torch.from_numpy(np.stack(arrays).astype(bool))


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre of a uint8 image (H, W, C) as (size, size, C); the input if it has that size.

    As in ADM (Dhariwal and Nichol, arXiv 2105.05233): halve with a box filter while the short side is at least twice
    the target, resize it to the target with a bicubic filter, crop the centre.
    """
    from PIL import Image

    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        return pixels
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    crop = np.asarray(image)[top : top + size, left : left + size]
    return crop[..., None] if channels == 1 else crop
