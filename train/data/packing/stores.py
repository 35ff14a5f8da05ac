"""How a packed data set keeps pictures and captions: what is stored and how it is made from raw samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ....model.codecs.characters import CharCodec
from ....model.codecs.subwords import TokenizerCodec, open_tokenizer, train_bpe
from ....model.codecs.vae import LatentCodec, center_crop

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass
class Moments:
    """Running mean and standard deviation per channel of what is diffused."""

    count: float = 0.0
    total: np.ndarray | float = 0.0
    square: np.ndarray | float = 0.0

    def add(self, mean: np.ndarray, variance: np.ndarray | float = 0.0) -> None:
        """Values (N, C, S, S), each the mean of a distribution of that variance."""
        mean = mean.astype(np.float64)
        self.count += mean.size / mean.shape[1]
        self.total = self.total + mean.sum((0, 2, 3))
        self.square = self.square + (mean**2 + variance).sum((0, 2, 3))

    def merge(self, other: dict) -> None:
        self.count += other["count"]
        self.total = self.total + np.array(other["total"])
        self.square = self.square + np.array(other["square"])

    def dump(self) -> dict:
        return {
            "count": self.count,
            "total": np.atleast_1d(self.total).tolist(),
            "square": np.atleast_1d(self.square).tolist(),
        }

    def summary(self) -> dict[str, list[float]]:
        if not self.count:
            return {"mean": [], "std": []}
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.square / self.count - mean**2, 0.0))
        return {"mean": [round(v, 6) for v in mean.tolist()], "std": [round(v, 6) for v in std.tolist()]}


class PixelStore:
    """Pictures as uint8 (S, S, C)."""

    def __init__(self, channels: int, size: int):
        self.channels, self.picture = channels, size
        self.about = {"kind": "pixels", "channels": channels, "size": size, "pixel_max": 255.0}

    def __call__(self, pictures: list[np.ndarray], moments: Moments) -> np.ndarray:
        """Pictures of the right size as they are stored."""
        stored = np.stack(pictures)
        moments.add(stored.transpose(0, 3, 1, 2) / 127.5 - 1.0)
        return stored


class LatentStore:
    """Pictures as fp16 (2C, S, S): mean and standard deviation of an autoencoder's latents."""

    channels = 3

    def __init__(self, vae: str, scale: float, size: int, device: str | None):
        from ....model.codecs.vae import load_vae

        net = load_vae(vae, device)
        factor, channels = 2 ** (len(net.config.block_out_channels) - 1), net.config.latent_channels
        if size % factor:
            raise ValueError(f"--size {size}: the autoencoder {vae} needs a multiple of {factor}")
        self.codec, self.picture = LatentCodec(vae, scale, channels, size // factor, device), size
        self.about = {
            "kind": "latents", "channels": channels, "size": size // factor, "picture": size, "vae": vae, "scale": scale
        }  # fmt: skip

    def __call__(self, pictures: list[np.ndarray], moments: Moments) -> np.ndarray:
        mean, std = (m.numpy() for m in self.codec.moments(np.stack(pictures)))
        scale = self.codec.scale
        moments.add(mean * scale, (std * scale) ** 2)
        return np.concatenate([mean, std], 1).astype(np.float16)


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """A uint8 picture (H, W, C) as (size, size, C), cropped to its centre where it has another size."""
    if min(pixels.shape[:2]) < 1:
        raise ValueError("picture is empty")
    return center_crop(pixels, size)


def text_plan(
    kind: str,
    captions: Callable[[], Iterator[str]],
    length: int | None,
    states: int,
    tokenizer: str,
    alphabet: str | None,
    out: Path,
) -> dict:
    """The `text` part of dataset.yaml: the vocabulary, built from all captions and written beside the data.

    Raises:
        ValueError: no captions, a tokenizer that cannot be had, unknown kind.
    """
    if kind == "characters":
        symbols, longest = set(), 0
        for caption in captions() if alphabet is None or length is None else ():
            longest = max(longest, len(caption.strip()))
            symbols |= set(caption.strip())
        alphabet = alphabet or "".join(sorted(symbols))
        if not alphabet or not (length or longest):
            raise ValueError("there is no caption to take an alphabet and a length from")
        return {"kind": kind, "length": length or longest, "states": len(alphabet) + 1, "pad": 0, "alphabet": alphabet}
    if kind == "bpe":
        made = train_bpe(captions(), states)
        about = {"kind": kind, "states": made.get_vocab_size(), "pad": 0, "start": None, "end": None}
    elif kind == "clip":
        made = open_tokenizer(tokenizer)
        start, end = (made.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
        if start is None or end is None:
            raise ValueError(f"{tokenizer}: not a CLIP tokenizer, it has no <|startoftext|> and <|endoftext|>")
        about = {"kind": kind, "states": made.get_vocab_size(), "pad": end, "start": start, "end": end}
    else:
        raise ValueError(f"--text {kind!r}; there are: characters, bpe, clip")
    made.save(str(out / TOKENIZER))
    if length is None:
        codec = text_codec({**about, "length": 2, "file": TOKENIZER}, out)
        length = max((max(codec.encode_measured(part)[1]) for part in _parts(captions(), 4096)), default=0)
        if not length:
            raise ValueError("there is no caption to take a length from")
    return {**about, "length": length, "file": TOKENIZER}


def text_codec(about: dict, folder: Path) -> CharCodec | TokenizerCodec:
    """The codec of a data set's captions."""
    if about["kind"] == "characters":
        return CharCodec(about["alphabet"], about["length"])
    return TokenizerCodec(
        folder / about["file"], about["length"], about["states"], about["pad"], about["start"], about["end"]
    )


class Encoded(NamedTuple):
    """The captions of one sample: ids (M, L) int32, and how many were too long and are cut off."""

    ids: np.ndarray
    cut: int


def encode_captions(codec: CharCodec | TokenizerCodec, captions: Sequence[Sequence[str]]) -> list[Encoded | ValueError]:
    """The tokens of several samples' captions; a ValueError for one with a character beyond the vocabulary."""
    if isinstance(codec, CharCodec):
        return [_characters(codec, texts) for texts in captions]
    ids, lengths = codec.encode_measured([c for texts in captions for c in texts])
    ids, cut = ids.numpy().astype(np.int32), np.array(lengths) > codec.length
    ends = np.cumsum([len(texts) for texts in captions])
    starts = ends - [len(texts) for texts in captions]
    return [Encoded(ids[a:b], int(cut[a:b].sum())) for a, b in zip(starts, ends, strict=True)]


def _characters(codec: CharCodec, texts: Sequence[str]) -> Encoded | ValueError:
    cut = sum(len(c) > codec.length for c in texts)
    try:
        return Encoded(codec.encode([c[: codec.length] for c in texts]).numpy().astype(np.int32), cut)
    except ValueError as error:
        return error


def _parts(items: Iterable, size: int) -> Iterator[list]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
