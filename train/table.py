"""A table model from config and codec: its groups of columns, its training, its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import kernels
from ..configs import schema
from ..configs.table_schema import TableConfig
from ..diffusion import Gaussian, LogLinear, Masked, Process, Space, Weighting
from ..kernels import Draw, Rng
from ..model.table import Categories, Numbers, TableDiT
from ..model.table_codec import TableCodec
from ..sample import Sampler
from .build import gaussian_schedule
from .checkpoint import WEIGHTS, CheckpointError, load_weights, pack_json, resolve
from .data.rows import Rows
from .loop import Trainer


@dataclasses.dataclass
class TableSystem:
    """A configured table model: groups `num` (normal scores) and `cat` (tokens), whichever the table has."""

    config: TableConfig
    space: Space
    net: TableDiT
    codec: TableCodec

    @property
    def samplers(self) -> dict[str, Sampler]:
        settings = {"num": self.config.numbers.sampler, "cat": self.config.tokens.sampler}
        return {m: Sampler(settings[m].kind, settings[m].grid) for m in self.space}

    def files(self) -> dict[str, bytes]:
        """What its checkpoints need beside weights and config: the codec."""
        return {"codec.json": pack_json(self.codec.to_json())}


def build_table(config: TableConfig, codec: TableCodec) -> TableSystem:
    """The system of a config for the columns of a codec, with weights drawn from the config's seed."""
    groups: dict[str, Numbers | Categories] = {}
    processes: dict[str, Process] = {}
    if codec.numbers:
        groups["num"], n = Numbers(len(codec.numbers)), config.numbers
        schedule = gaussian_schedule(n.schedule)
        processes["num"] = Gaussian((len(codec.numbers),), schedule, n.t_min, n.time_input, n.predicts)
    if codec.tokens:
        groups["cat"], c = Categories(tuple(codec.states)), config.tokens
        processes["cat"] = Masked(
            len(codec.tokens), max(codec.states), LogLinear(c.delta), c.t_min, c.counted, c.mask_column
        )
    net = config.network
    clocks = [m for m in net.clocks if m in groups] or list(groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TableDiT(
            groups,
            net.width,
            net.depth,
            net.heads,
            clocks[:1] if config.times.draw == "unified" else clocks,
            net.mlp,
            net.deep_heads,
            config.tokens.mask_column is not None,
            config.known > 0,
            net.time_scale,
            net.sinusoids,
        )
    return TableSystem(config, Space(processes), model, codec)


class TableTrainer(Trainer):
    """Trains a table model into a run folder; see `Trainer`."""

    def __init__(self, config: TableConfig, out: Path, codec: TableCodec, tokens: Tensor, scores: Tensor, **options):
        self.codec = codec
        device = torch.device(options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
        rows = Rows(tokens, scores, device)
        super().__init__(config, out, device, (rows, rows), **options)

    def build(self) -> TableSystem:
        return build_table(self.config, self.codec)

    def in_bf16(self):
        """Only where the config says so: layers this narrow gain nothing from it, and numbers lose digits."""
        return self.config.train.precision == "bf16"

    def weightings(self) -> nn.ModuleDict:
        settings = {"num": self.config.numbers.loss, "cat": self.config.tokens.loss}
        return nn.ModuleDict(
            {
                m: Weighting(process, settings[m].weighting, settings[m].scale * process.shape[0], settings[m].gamma)
                for m, process in self.system.space.items()
            }
        )

    def learned(self):
        return list(self.system.space)

    def losses(self, x0, t, rng):
        given = self.given(rng) if self.config.known > 0 else None
        return self.system.space.losses(self.engine.net(self.net), x0, t, rng, list(x0), given)

    def given(self, rng: Rng) -> dict[str, Tensor]:
        """{group: (B, C) bool}: in a share `known` of the rows, every column is given with the row's own probability.

        A column's token and its number are given together.
        """
        codec = self.codec
        u = kernels.uniform(rng.keys("known", Draw.HOLD), len(codec.columns) + 2)
        share = torch.where(u[:, :1] <= self.config.known, u[:, 1:2], 0.0)
        known = dict(zip(codec.columns, (u[:, 2:] <= share).unbind(1), strict=True))
        names = {"num": codec.numbers, "cat": codec.tokens}
        return {m: torch.stack([known[name] for name in names[m]], 1) for m in self.system.space}

    def _check_same_run(self, folder):
        super()._check_same_run(folder)
        saved = TableCodec.from_json(json.loads((folder / "codec.json").read_text(encoding="utf-8")))
        if saved.to_json() != self.codec.to_json():  # an older file may lack what has a default
            raise CheckpointError(f"{self.out} holds a run of another table: choose another --out")


def load_table(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> TableSystem:
    """The table model saved in a checkpoint or in the newest one of a run.

    Raises:
        CheckpointError: no, a truncated, or another architecture's checkpoint, or not one of a table.
    """
    folder = resolve(path)
    file = folder / "codec.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is not the checkpoint of a table: it has no codec.json")
    try:
        codec = TableCodec.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint file {file} is truncated or damaged") from None
    system = build_table(schema.load(folder / "config.yaml", model=TableConfig), codec)
    load_weights(system.net, folder / WEIGHTS[weights])
    system.net.to(device).eval()
    return system
