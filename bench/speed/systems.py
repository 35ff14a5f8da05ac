"""What training and sampling are measured on: the shipped recipes at four sizes, with data made up in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ...configs.config import Config, Image
from ...configs.load import load_config
from ...diffusion import Space
from ...sample.pipeline import Pipeline, build_pipeline
from ...train.data.pairs import Pairs
from ...train.trainer import Trainer

TINY = ["train.batch=16", "network.depth=2", "network.heads=2", "network.head_dim=8"]
TINY += [f"modalities.{m}.stream.width=16" for m in ("image", "text")]
WIDE = [f"modalities.{m}.stream.width=1024" for m in ("image", "text")]  # layers large enough for fp8
WIDE += ["network.depth=1", "train.lr=1e-5"]
SIZES = {  # a shipped config and settings of it
    "official": ("text_image/stage3", []),
    "emoji": ("emoji/stage3", []),
    "digits": ("digits", []),
    "tiny": ("digits", TINY),
    "wide": ("digits", [*TINY, *WIDE]),
}
ROWS = 512  # of made-up data


def config_of(size: str, overrides: list[str]) -> Config:
    """The config of a size; never resumes and begins from nothing."""
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    name, own = SIZES[size]
    return load_config(name, [*own, "init=null", "train.freeze=[]", *overrides])


class Bench(Trainer):
    """A trainer on made-up data of the config's shapes: noise pictures, captions of random length."""

    def __init__(self, config: Config, device: torch.device):
        self.temporary = tempfile.TemporaryDirectory()
        self.config, pairs = config, made_up(config, device)
        super().__init__(config, Path(self.temporary.name), device, (pairs, pairs), quiet=True)

    def build(self) -> Pipeline:
        return build_pipeline(self.config, codecs=False)


def made_up(config: Config, device: torch.device) -> Pairs:
    """Pairs on the device."""
    space = build_space(config)
    generator = torch.Generator().manual_seed(0)
    (image,) = (m for m, c in config.modalities.items() if isinstance(c, Image))
    (text,) = (m for m in config.modalities if m != image)
    length, process = space[text].shape[0], space[text]
    tokens = torch.randint(0, process.states, (ROWS, 1, length), generator=generator)
    if getattr(process, "pad_id", None) is not None:
        ends = torch.randint(length // 4, length + 1, (ROWS, 1, 1), generator=generator)
        tokens = torch.where(torch.arange(length) < ends, tokens, process.pad_id)
    pictures = torch.randn(ROWS, *space[image].shape, generator=generator).clamp(-1.0, 1.0)
    return OnDevice(pictures.to(device), tokens.to(device), names=(image, text))


class OnDevice(Pairs):
    """Pairs that lie on a GPU: indices go there, batches never leave it."""

    def batch(self, seed, step, rows, size):
        index = (torch.arange(rows.start, rows.stop, device=self.images.device) + step * size) % len(self)
        image, text = self.names
        return {image: self.images[index], text: self.captions[index, 0]}


def build_space(config: Config) -> Space:
    """The processes alone, without a network's memory."""
    with torch.device("meta"):
        return build_pipeline(config, codecs=False).space


def shaken(system: Pipeline, scale: float = 0.02) -> Pipeline:
    """The system with noise on all weights, so that zero-initialized heads answer something too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in system.net.parameters():
            p.add_((scale * torch.randn(p.shape, generator=generator)).to(p))
    return system
