"""From a config to the things it describes: space, network, codecs, data, weightings. Every command builds here."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..configs.schema import Config, Image, Schedule, Text
from ..diffusion import GAUSSIAN_SCHEDULES, Gaussian, Guidance, LogLinear, Masked, Process, Space, Uniform, Weighting
from ..diffusion.schedules import GaussianSchedule
from ..model import MMDiT, Patches, Tokens
from ..model.codecs import PAD, CharCodec, PixelCodec
from ..sample import Sampler
from .data import digits, pairs


@dataclasses.dataclass
class System:
    """A configured model: what the commands pass around."""

    config: Config
    space: Space
    net: MMDiT
    codecs: dict[str, PixelCodec | CharCodec]

    @property
    def images(self) -> list[str]:
        """Names of the picture modalities."""
        return [m for m, c in self.config.modalities.items() if isinstance(c, Image)]

    @property
    def texts(self) -> list[str]:
        """Names of the text modalities."""
        return [m for m, c in self.config.modalities.items() if isinstance(c, Text)]

    @property
    def samplers(self) -> dict[str, Sampler]:
        return {m: Sampler(c.sampler.kind, c.sampler.grid) for m, c in self.config.modalities.items()}

    def guidance(self, given: bool) -> Guidance:
        """The configured guidance of conditional (something is given) or joint sampling."""
        settings = self.config.sample
        chosen = settings.guidance if given or settings.joint_guidance is None else settings.joint_guidance
        return Guidance(chosen.scale, chosen.final_time, tuple(chosen.interval))


def build(config: Config) -> System:
    """The system a config describes, with weights freshly drawn from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = MMDiT(
            {m: _stream(c) for m, c in config.modalities.items()},
            config.network.depth,
            config.network.heads,
            config.network.head_dim,
            config.network.time_scale,
        )
    space = Space({m: _process(c) for m, c in config.modalities.items()})
    return System(config, space, net, {m: _codec(c) for m, c in config.modalities.items()})


def weightings(config: Config, space: Space) -> nn.ModuleDict:
    """{name: Weighting}, as configured."""
    return nn.ModuleDict(
        {m: Weighting(space[m], c.loss.weighting, c.loss.scale, c.loss.gamma) for m, c in config.modalities.items()}
    )


def load_data(system: System) -> tuple[pairs.Pairs, pairs.Pairs]:
    """Training and held-out pairs of a system with one picture and one text modality."""
    if len(system.images) != 1 or len(system.texts) != 1:
        raise ValueError("image-text data needs exactly one picture and one text modality in the config")
    image, text = system.images[0], system.texts[0]
    data, codecs = system.config.data, system.codecs
    args = (codecs[image].encode, codecs[text].encode, data.test_share, data.split_seed)
    if data.name == "digits":
        loaded = digits.load(*args)
    elif data.path is None:
        raise ValueError("data.path: an npz data set needs the path of its file")
    else:
        loaded = pairs.load_npz(data.path, *args)
    return tuple(dataclasses.replace(part, names=(image, text)) for part in loaded)


def gaussian_schedule(c: Schedule) -> GaussianSchedule:
    """The schedule a config names, with its options."""
    try:
        return GAUSSIAN_SCHEDULES[c.name](**c.options)
    except TypeError:
        raise ValueError(f"schedule {c.name} does not take the options {c.options}") from None


def _process(c: Image | Text) -> Process:
    if isinstance(c, Image):
        schedule = gaussian_schedule(c.schedule)
        return Gaussian((c.channels, c.size, c.size), schedule, c.t_min, c.time_input, c.predicts)
    states, schedule = len(c.alphabet) + 1, LogLinear(c.delta)
    if c.process == "uniform":
        return Uniform(c.length, states, schedule, c.t_min)
    return Masked(c.length, states, schedule, c.t_min, c.counted, pad_id=PAD, attend_pads=c.attend_pads)


def _stream(c: Image | Text) -> Patches | Tokens:
    s = c.stream
    if isinstance(c, Image):
        return Patches(c.channels, c.size, s.patch, s.width, s.cond, s.tower, s.head)
    return Tokens(c.length, len(c.alphabet) + 1, s.width, None, s.cond, s.tower, s.head)


def _codec(c: Image | Text) -> PixelCodec | CharCodec:
    if isinstance(c, Image):
        return PixelCodec(c.channels, c.size, c.pixel_max)
    return CharCodec(c.alphabet, c.length)
