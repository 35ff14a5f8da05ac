"""The models that are measured: shipped recipes at several sizes, with synthetic data in memory."""

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
ROWS = 512  # of synthetic data


def config_of(size: str, overrides: list[str]) -> Config:
    """The config of a size, without initial weights from another run and with nothing frozen."""
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    name, own = SIZES[size]
    return load_config(name, [*own, "init=null", "train.freeze=[]", *overrides])


class SyntheticTrainer(Trainer):
    """A trainer on synthetic data of the config's shapes: images of noise, captions of random length."""

    def __init__(self, config: Config, device: torch.device):
        self.temporary = tempfile.TemporaryDirectory()
        self.config, pairs = config, synthetic_pairs(config, device)
        super().__init__(config, Path(self.temporary.name), device, (pairs, pairs), quiet=True)

    def build(self) -> Pipeline:
        return build_pipeline(self.config, codecs=False)


def synthetic_pairs(config: Config, device: torch.device) -> Pairs:
    """Random images and captions, on the device."""
    space = build_space(config)
    generator = torch.Generator().manual_seed(0)
    (image,) = (m for m, c in config.modalities.items() if isinstance(c, Image))
    (text,) = (m for m in config.modalities if m != image)
    length, pad = space[text].shape[0], getattr(space[text], "pad_id", None)
    tokens = torch.randint(0, config.modalities[text].states, (ROWS, 1, length), generator=generator)
    if pad is not None:
        ends = torch.randint(length // 4, length + 1, (ROWS, 1, 1), generator=generator)
        tokens = torch.where(torch.arange(length) < ends, tokens, pad)
    images = torch.randn(ROWS, *space[image].shape, generator=generator).clamp(-1.0, 1.0)
    return OnDevice(images.to(device), tokens.to(device), names=(image, text))


class OnDevice(Pairs):
    """Pairs in GPU memory, where batches are also indexed."""

    def batch(self, seed, step, rows, size):
        index = (torch.arange(rows.start, rows.stop, device=self.images.device) + step * size) % len(self)
        image, text = self.names
        return {image: self.images[index], text: self.captions[index, 0]}


def build_space(config: Config) -> Space:
    """The processes alone, without a network's memory."""
    with torch.device("meta"):
        return build_pipeline(config, codecs=False).space


def randomize_weights(pipeline: Pipeline, scale: float = 0.02) -> Pipeline:
    """Add noise to all weights in place, so that zero-initialized heads have nonzero outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pipeline.net.parameters():
            p.add_((scale * torch.randn(p.shape, generator=generator)).to(p))
    return pipeline
