"""Storage formats of images and captions in a packed data set, computed from raw samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ....model.codecs.characters import CharCodec
from ....model.codecs.subwords import TokenizerCodec, open_tokenizer, train_bpe
from ....model.codecs.vae import LatentCodec, center_crop, load_vae

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass
class Moments:
    """Running mean and standard deviation per channel of the diffused tensor."""

    count: float = 0.0
    total: np.ndarray | float = 0.0
    square: np.ndarray | float = 0.0

    def add(self, mean: np.ndarray, variance: np.ndarray | float = 0.0) -> None:
        """Add N random tensors given their means (N, C, S, S) and variances (broadcastable)."""
        mean = mean.astype(np.float64)
        self.count += mean.size / mean.shape[1]
        self.total = self.total + mean.sum((0, 2, 3))
        self.square = self.square + (mean**2 + variance).sum((0, 2, 3))

    def merge(self, other: dict) -> None:
        """Add the sums of another instance, as `dump` returns them."""
        self.count += other["count"]
        self.total = self.total + np.array(other["total"])
        self.square = self.square + np.array(other["square"])

    def dump(self) -> dict:
        """The sums as JSON values."""
        return {
            "count": self.count,
            "total": np.atleast_1d(self.total).tolist(),
            "square": np.atleast_1d(self.square).tolist(),
        }

    def summary(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel, rounded to six digits."""
        if not self.count:
            return {"mean": [], "std": []}
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.square / self.count - mean**2, 0.0))
        return {"mean": [round(v, 6) for v in mean.tolist()], "std": [round(v, 6) for v in std.tolist()]}


class PixelStore:
    """Stores images as uint8 (S, S, C)."""

    def __init__(self, channels: int, size: int):
        self.channels, self.image_size = channels, size
        self.about = {"kind": "pixels", "channels": channels, "size": size, "pixel_max": 255.0}

    def __call__(self, images: list[np.ndarray], moments: Moments) -> np.ndarray:
        """The stored arrays of uint8 images (image_size, image_size, C); their values are added to `moments`."""
        stored = np.stack(images)
        moments.add(stored.transpose(0, 3, 1, 2) / 127.5 - 1.0)
        return stored


class LatentStore:
    """Stores images as fp16 (2C, S, S): mean and standard deviation of an autoencoder's latents."""

    channels = 3

    def __init__(self, vae: str, scale: float, size: int, device: torch.device | str | None):
        net = load_vae(vae, device)
        factor, channels = 2 ** (len(net.config.block_out_channels) - 1), net.config.latent_channels
        if size % factor:
            raise ValueError(f"--size {size}: the autoencoder {vae} needs a multiple of {factor}")
        self.codec, self.image_size = LatentCodec(vae, scale, channels, size // factor, device), size
        self.about = {
            "kind": "latents",
            "channels": channels,
            "size": size // factor,
            "picture": size,
            "vae": vae,
            "scale": scale,
        }

    def __call__(self, images: list[np.ndarray], moments: Moments) -> np.ndarray:
        """The stored arrays of uint8 images (image_size, image_size, 3); their latents are added to `moments`."""
        mean, std = (m.numpy() for m in self.codec.moments(np.stack(images)))
        scale = self.codec.scale
        moments.add(mean * scale, (std * scale) ** 2)
        return np.concatenate([mean, std], 1).astype(np.float16)


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """A uint8 image (H, W, C) as (size, size, C), resized and cropped to its centre if it has another size."""
    if min(pixels.shape[:2]) < 1:
        raise ValueError("image is empty")
    return center_crop(pixels, size)


Captions = Callable[[], Iterator[str]]


def text_section(
    kind: str,
    captions: Captions,
    length: int | None,
    states: int,
    tokenizer: str | None,
    alphabet: str | None,
    out: Path,
) -> dict:
    """The `text` section of dataset.yaml, with a vocabulary built from all captions.

    A tokenizer is also written into the folder `out`.

    Raises:
        ValueError: no captions, a tokenizer that cannot be loaded, or an unknown kind.
    """
    if kind == "characters":
        return _characters_section(captions, length, alphabet)
    if kind == "bpe":
        trained = train_bpe(captions(), states)
        section = {"kind": kind, "states": trained.get_vocab_size(), "pad": 0, "start": None, "end": None}
    elif kind == "clip":
        trained, section = _clip_section(tokenizer)
    else:
        raise ValueError(f"--text {kind!r}; choose one of: characters, bpe, clip")
    trained.save(str(out / TOKENIZER))
    if length is None:
        codec = text_codec({**section, "length": 2, "file": TOKENIZER}, out)
        length = max((max(codec.encode_with_lengths(part)[1]) for part in _parts(captions(), 4096)), default=0)
        if not length:
            raise ValueError("there is no caption to determine the length from")
    return {**section, "length": length, "file": TOKENIZER}


def _characters_section(captions: Captions, length: int | None, alphabet: str | None) -> dict:
    symbols, longest = set(), 0
    if alphabet is None or length is None:
        for caption in captions():
            longest = max(longest, len(caption.strip()))
            symbols |= set(caption.strip())
    alphabet = alphabet or "".join(sorted(symbols))
    length = length or longest
    if not alphabet or not length:
        raise ValueError("there is no caption to determine the alphabet and the length from")
    return {"kind": "characters", "length": length, "states": len(alphabet) + 1, "pad": 0, "alphabet": alphabet}


def _clip_section(path: str | None) -> tuple[Tokenizer, dict]:
    if path is None:
        raise ValueError("--text clip needs --tokenizer: a file, a folder or a hub id")
    tokenizer = open_tokenizer(path)
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    if start is None or end is None:
        raise ValueError(f"{path}: not a CLIP tokenizer, it has no <|startoftext|> and <|endoftext|>")
    return tokenizer, {"kind": "clip", "states": tokenizer.get_vocab_size(), "pad": end, "start": start, "end": end}


def text_codec(section: dict, folder: Path) -> CharCodec | TokenizerCodec:
    """The codec of a data set's captions, from the `text` section of its dataset.yaml."""
    if section["kind"] == "characters":
        return CharCodec(section["alphabet"], section["length"])
    special = section["pad"], section["start"], section["end"]
    return TokenizerCodec(folder / section["file"], section["length"], section["states"], *special)


class EncodedCaptions(NamedTuple):
    """The captions of one sample: ids (M, L) int32, and the number of captions that were truncated."""

    ids: np.ndarray
    truncated: int


def encode_captions(
    codec: CharCodec | TokenizerCodec, captions: Sequence[Sequence[str]]
) -> list[EncodedCaptions | ValueError]:
    """The tokens of several samples' captions; a ValueError for a sample with a character outside the vocabulary."""
    if isinstance(codec, CharCodec):
        return [_encode_characters(codec, texts) for texts in captions]
    ids, lengths = codec.encode_with_lengths([caption for texts in captions for caption in texts])
    ids, truncated = ids.numpy().astype(np.int32), np.array(lengths) > codec.length
    encoded, start = [], 0
    for texts in captions:
        part = slice(start, start + len(texts))
        encoded.append(EncodedCaptions(ids[part], int(truncated[part].sum())))
        start = part.stop
    return encoded


def _encode_characters(codec: CharCodec, texts: Sequence[str]) -> EncodedCaptions | ValueError:
    truncated = sum(len(caption) > codec.length for caption in texts)
    try:
        ids = codec.encode([caption[: codec.length] for caption in texts])
    except ValueError as error:
        return error
    return EncodedCaptions(ids.numpy().astype(np.int32), truncated)


def _parts(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of up to `size` items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
