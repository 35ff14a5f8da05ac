"""From a config to the things it describes: space, network, codecs, data, weightings. Every command builds here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..configs.schema import Config, Image, Schedule, Text
from ..diffusion import GAUSSIAN_SCHEDULES, Gaussian, Guidance, LogLinear, Masked, Process, Space, Uniform, Weighting
from ..diffusion.schedules import GaussianSchedule
from ..model import MMDiT, Patches, Tokens
from ..model.codecs import CharCodec, PixelCodec
from ..model.latents import LatentCodec
from ..model.tokenizer import TokenizerCodec
from ..sample import Given, Sampler, sample
from .data import digits, pairs
from .data.locate import locate, not_found
from .data.packed import Packed, load_packed

Codec = PixelCodec | LatentCodec | CharCodec | TokenizerCodec
TOKENIZER = "{}.tokenizer.json"  # a modality's vocabulary inside a checkpoint


@dataclasses.dataclass
class System:
    """A configured model: what the commands pass around."""

    config: Config
    space: Space
    net: MMDiT
    codecs: dict[str, Codec]

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

    def precision(self, asked: str | None = None) -> str:
        """What the network computes in when samples are drawn where it lies: fp32 or bf16.

        asked: fp32, bf16 or auto; default the config's `sample.precision`.
        """
        setting = asked or self.config.sample.precision
        if setting not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision must be auto, fp32 or bf16, got {setting!r}")
        if setting != "auto":
            return setting
        on_gpu = next(self.net.parameters()).device.type == "cuda"
        return "bf16" if on_gpu and self.config.train.precision != "fp32" else "fp32"

    def files(self) -> dict[str, bytes]:
        """What its checkpoints need beside weights and config, {name: content}: the vocabularies."""
        return {
            TOKENIZER.format(m): codec.json().encode()
            for m, codec in self.codecs.items()
            if isinstance(codec, TokenizerCodec)
        }

    def guidance(self, given: bool) -> Guidance:
        """The configured guidance of conditional (something is given) or joint sampling."""
        settings = self.config.sample
        chosen = settings.guidance if given or settings.joint_guidance is None else settings.joint_guidance
        return Guidance(chosen.scale, chosen.final_time, tuple(chosen.interval))

    def draw(self, given: Mapping[str, Tensor | Given] | None = None, n: int | None = None, **more):
        """`sample` as the config says; `more` are its other arguments, or replace what the config says."""
        settings = {"steps": self.config.sample.steps, "guidance": self.guidance(bool(given))}
        settings |= {"samplers": self.samplers, "engine": self.config.engine, "precision": self.precision()}
        return sample(self.net, self.space, given, n, **{**settings, **more})


def build(config: Config, folder: Path | None = None, codecs: bool = True) -> System:
    """The system a config describes, with weights freshly drawn from its seed.

    folder: a checkpoint that holds its tokenizers (see `System.files`); default: they are where the config says.
    codecs: False leaves them out; benchmarks need none.
    """
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
    made = {m: _codec(m, c, folder) for m, c in config.modalities.items()} if codecs else {}
    return System(config, space, net, made)


def weightings(config: Config, space: Space) -> nn.ModuleDict:
    """{name: Weighting}, as configured."""
    return nn.ModuleDict(
        {m: Weighting(space[m], c.loss.weighting, c.loss.scale, c.loss.gamma) for m, c in config.modalities.items()}
    )


def load_data(system: System, log: Path | None = None) -> tuple[pairs.Pairs | Packed, pairs.Pairs]:
    """Training and held-out pairs of a system with one picture and one text modality.

    log: file that unreadable samples of a packed data set are named in.

    Raises:
        ValueError: no such data, or it does not fit the config.
    """
    if len(system.images) != 1 or len(system.texts) != 1:
        raise ValueError("image-text data needs exactly one picture and one text modality in the config")
    image, text = system.images[0], system.texts[0]
    data, codecs = system.config.data, system.codecs
    args = (codecs[image].encode, codecs[text].encode, data.test_share, data.split_seed)
    if data.name == "digits":
        loaded = digits.load(*args)
    elif data.path is None:
        raise ValueError(f"data.path: {data.name} data needs the path of its file or folder")
    elif data.name == "packed":
        return load_packed(system.config, (image, text), codecs[text], log)
    else:
        loaded = pairs.load_npz(data.path, *args)
    return tuple(dataclasses.replace(part, names=(image, text)) for part in loaded)


def with_data(system: System, data: str, **settings) -> System:
    """The system with another data set, split as its own would be; `settings` of `Data` besides.

    data: digits, an .npz of pairs, or a folder made by `anystate data pack`.

    Raises:
        ValueError: there is none.
    """
    path = None if data == "digits" else locate(data)
    if path is None and data != "digits":
        raise ValueError(not_found("--data takes digits, an .npz file or a folder of anystate data pack:", data))
    settings |= {"name": "digits" if path is None else "packed" if path.is_dir() else "npz", "path": path and data}
    config = system.config.model_copy(update={"data": system.config.data.model_copy(update=settings)})
    return dataclasses.replace(system, config=config)


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
    schedule = LogLinear(c.delta)
    if c.process == "uniform":
        return Uniform(c.length, c.states, schedule, c.t_min)
    return Masked(c.length, c.states, schedule, c.t_min, c.counted, c.mask_column, c.pad, c.attend_pads)


def _stream(c: Image | Text) -> Patches | Tokens:
    s = c.stream
    if isinstance(c, Image):
        return Patches(c.channels, c.size, s.patch, s.width, s.cond, s.tower, s.head)
    columns = c.states + 1 if c.mask_column else None
    return Tokens(c.length, c.states, s.width, columns, s.cond, s.tower, s.head)


def _codec(name: str, c: Image | Text, folder: Path | None) -> Codec:
    if isinstance(c, Image):
        if c.latents:
            return LatentCodec(c.latents.vae, c.latents.scale, c.channels, c.size)
        return PixelCodec(c.channels, c.size, c.pixel_max)
    if c.tokenizer is None:
        return CharCodec(c.alphabet, c.length)
    t, kept = c.tokenizer, folder and folder / TOKENIZER.format(name)
    path = kept if kept and kept.is_file() else locate(t.path) or t.path
    return TokenizerCodec(path, c.length, t.states, t.pad, t.start, t.end)
