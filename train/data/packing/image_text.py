"""Images with captions, packed without a config: what is stored of them follows from options and from the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....configs.config import Config
from ....configs.load import parse_config
from ....configs.options import VAE_SCALE
from ....model.codecs.subwords import TokenizerCodec, open_tokenizer, train_bpe
from ....model.codecs.vae import load_vae, prepare_image
from .sources import IMAGE, TEXT, Job, RawSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = f"{TEXT}.tokenizer.json"
ANY = {IMAGE: {"kind": "image", "channels": 3, "size": 1}, TEXT: {"kind": "text", "alphabet": " ", "length": 1}}
Captions = Callable[[], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of packing a source; the settings of a data set cannot be changed once its packing has begun.

    Those from `size` to `length` are for images and captions without a config.

    Args:
        size: side of the images in pixels; None: that of the first image.
        channels: of the images.
        vae: autoencoder of the latents; None: store pixels.
        scale: factor on the latents.
        text: characters, bpe or clip.
        states: vocabulary size of bpe.
        tokenizer: file, folder or hub id of the clip tokenizer.
        alphabet: None: the characters of the captions.
        length: tokens per caption; None: fits the longest.
        shard_size: samples per shard, unless the source determines it.
        test_share: held-out share where the source has no split.
        seed: of the order of the samples and of that split.
    """

    size: int | None = None
    channels: int = 3
    vae: str | None = None
    scale: float = VAE_SCALE
    text: str = "characters"
    states: int = 1024
    tokenizer: str | None = None
    alphabet: str | None = None
    length: int | None = None
    shard_size: int = 4096
    test_share: float = 0.0
    seed: int = 0


def minimal_config(sections: dict[str, dict[str, Any]], where: str = "images with captions") -> Config:
    """A config of these modalities, whose streams and other settings mean nothing; `where` names them in errors."""
    modalities = {m: {"stream": {"width": 1}, **section} for m, section in sections.items()}
    network, train = {"depth": 1, "heads": 1, "head_dim": 1}, {"steps": 1, "batch": 1}
    return parse_config({"name": "packed", "modalities": modalities, "network": network, "train": train}, where)


def plan_image_text(
    settings: Settings, source: RawSource, jobs: list[Job], out: Path, device: torch.device | str | None
) -> dict[str, dict[str, Any]]:
    """What is packed of images with captions, see `pack.plan_config`; a tokenizer is written into the folder `out`.

    Raises:
        ValueError: nothing to learn a setting from, or an autoencoder or a tokenizer that cannot be loaded.
    """
    image = _image_section(settings, source, jobs, device)
    text = _text_section(settings, source.captions, out)
    required = {"required": True}
    return {
        IMAGE: {"section": image, "settings": image, "versions": False, "raw": None, **required},
        TEXT: {"section": text, "settings": text, "versions": True, "raw": "captions", **required},
    }


def _image_section(
    settings: Settings, source: RawSource, jobs: list[Job], device: torch.device | str | None
) -> dict[str, Any]:
    size = settings.size or _first_size(source, jobs, settings.channels)
    if settings.vae is None:
        return {"kind": "image", "channels": settings.channels, "size": size, "pixel_max": 255.0}
    net = load_vae(settings.vae, device).config
    factor, latents = 2 ** (len(net.block_out_channels) - 1), {"vae": settings.vae, "scale": settings.scale}
    if size % factor:
        raise ValueError(f"--size {size}: the autoencoder {settings.vae} needs a multiple of {factor}")
    return {"kind": "image", "channels": net.latent_channels, "size": size // factor, "latents": latents}


def _first_size(source: RawSource, jobs: list[Job], channels: int) -> int:
    """The shorter side of the first readable image."""
    for raw in source.read(jobs[0]):
        try:
            return min(prepare_image(raw.values[IMAGE], channels).shape[:2])
        except ValueError:
            continue
    raise ValueError(f"{source.name}: no image can be read; give --size")


def _text_section(settings: Settings, captions: Captions, out: Path) -> dict[str, Any]:
    """The text modality, with a vocabulary built from all captions."""
    if settings.text == "characters":
        return {"kind": "text", **_characters(captions, settings.length, settings.alphabet)}
    if settings.text == "bpe":
        tokenizer = train_bpe(captions(), settings.states)
        special = {"pad": 0, "start": None, "end": None}
    elif settings.text == "clip":
        tokenizer, special = _clip(settings.tokenizer)
    else:
        raise ValueError(f"--text {settings.text!r}; choose one of: characters, bpe, clip")
    tokenizer.save(str(out / TOKENIZER))
    states, length = tokenizer.get_vocab_size(), settings.length
    if length is None:
        codec = TokenizerCodec(out / TOKENIZER, 2, states, **special)
        length = max((max(codec.encode_with_lengths(part)[1]) for part in _parts(captions(), 4096)), default=0)
        if not length:
            raise ValueError("there is no caption to determine the length from")
    path = "{folder}/" + TOKENIZER
    return {
        "kind": "text",
        "length": length,
        "tokenizer": {"kind": settings.text, "path": path, "states": states, **special},
    }


def _characters(captions: Captions, length: int | None, alphabet: str | None) -> dict[str, Any]:
    symbols, longest = set(), 0
    if alphabet is None or length is None:
        for caption in captions():
            longest = max(longest, len(caption.strip()))
            symbols |= set(caption.strip())
    alphabet = alphabet or "".join(sorted(symbols))
    length = length or longest
    if not alphabet or not length:
        raise ValueError("there is no caption to determine the alphabet and the length from")
    return {"length": length, "alphabet": alphabet}


def _clip(path: str | None) -> tuple[Tokenizer, dict[str, Any]]:
    if path is None:
        raise ValueError("--text clip needs --tokenizer: a file, a folder or a hub id")
    tokenizer = open_tokenizer(path)
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    if start is None or end is None:
        raise ValueError(f"{path}: not a CLIP tokenizer, it has no <|startoftext|> and <|endoftext|>")
    return tokenizer, {"pad": end, "start": start, "end": end}


def _parts(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of up to `size` items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
