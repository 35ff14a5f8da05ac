"""The models that are measured: shipped recipes at several sizes, with synthetic data in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...configs.config import Config
from ...configs.load import load_config
from ...diffusion import Process, Space
from ...model.build import build_codecs, build_space
from ...sample.pipeline import Pipeline, build_pipeline
from ...train.trainer import Trainer

TINY = ["train.batch=16", "network.depth=2", "network.heads=2", "network.head_dim=8"]
TINY += [f"modalities.{m}.stream.width=16" for m in ("image", "text")]
TINY += [f"modalities.{m}.sampler={{}}" for m in ("image", "text")]  # the default samplers, as in the official recipe
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
    """A trainer on synthetic data of the config's space."""

    def __init__(self, config: Config, device: torch.device):
        self.temporary, codecs = tempfile.TemporaryDirectory(), build_codecs(config)
        data = Synthetic(build_space(config, codecs), device)
        super().__init__(config, Path(self.temporary.name), device, (data, data), quiet=True, codecs=codecs)


class Synthetic:
    """Random training data of a space, kept on a device: normal numbers, and tokens.

    Tokens of a process with a pad have random lengths, from a quarter of the positions to all; pads follow.
    """

    def __init__(self, space: Space, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.x = {m: random_data(process, generator).to(device) for m, process in space.items()}

    def __len__(self) -> int:
        return ROWS

    def batch(self, seed: int, step: int, rows: range, size: int) -> dict[str, Tensor]:
        """Rows `rows` of batch number `step` of `size`; indexed on the device."""
        device = next(iter(self.x.values())).device
        index = (torch.arange(rows.start, rows.stop, device=device) + step * size) % len(self)
        return {m: x[index] for m, x in self.x.items()}


def random_data(process: Process, generator: torch.Generator) -> Tensor:
    """(ROWS, *shape) random clean data of a process."""
    states, pad, length = getattr(process, "states", None), getattr(process, "pad_id", None), process.shape[0]
    if states is None:
        return torch.randn(ROWS, *process.shape, generator=generator)
    tokens = torch.randint(0, states, (ROWS, *process.shape), generator=generator)
    if pad is None:
        return tokens
    ends = torch.randint(length // 4, length + 1, (ROWS, 1), generator=generator)
    return torch.where(torch.arange(length) < ends, tokens, pad)


def untrained(size: str, overrides: list[str]) -> Pipeline:
    """The model of a size with random weights, ready to be sampled."""
    pipeline = randomize_weights(build_pipeline(config_of(size, overrides)))
    pipeline.net.eval().requires_grad_(False)
    return pipeline


def randomize_weights(pipeline: Pipeline, scale: float = 0.02) -> Pipeline:
    """Add noise to all weights in place, so that zero-initialized heads have nonzero outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pipeline.net.parameters():
            p.add_((scale * torch.randn(p.shape, generator=generator)).to(p))
    return pipeline
