"""A table model from config and codec: its groups of columns, its training, its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import kernels
from ..configs.runs import CheckpointError
from ..configs.table import TableConfig
from ..diffusion import Weighting
from ..kernels import Draw, Rng
from ..model.codecs.table.codec import TableCodec
from ..sample.table.pipeline import TablePipeline, build_table_pipeline
from .data.rows import Rows
from .trainer import Trainer


class TableTrainer(Trainer):
    """Trains a table model into a run folder; see `Trainer`."""

    def __init__(self, config: TableConfig, out: Path, codec: TableCodec, tokens: Tensor, scores: Tensor, **options):
        self.codec = codec
        device = torch.device(options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
        rows = Rows(tokens, scores, device)
        super().__init__(config, out, device, (rows, rows), **options)

    def build(self) -> TablePipeline:
        return build_table_pipeline(self.config, self.codec)

    def in_bf16(self):
        """Only where the config says so: layers this narrow gain nothing from it, and numbers lose digits."""
        return self.config.train.precision == "bf16"

    def weightings(self) -> nn.ModuleDict:
        settings = {"num": self.config.numerical.loss, "cat": self.config.categorical.loss}
        return nn.ModuleDict(
            {
                m: Weighting(process, settings[m].weighting, settings[m].scale * process.shape[0], settings[m].gamma)
                for m, process in self.system.space.items()
            }
        )

    def learned(self):
        return list(self.system.space)

    def losses(self, x0, t, rng):
        given = self.given(rng) if self.config.conditioning_prob > 0 else None
        return self.system.space.losses(self.engine.net(self.net), x0, t, rng, list(x0), given)

    def given(self, rng: Rng) -> dict[str, Tensor]:
        """{group: (B, C) bool}: in a share `known` of the rows, every column is given with the row's own probability.

        A column's token and its number are given together.
        """
        codec = self.codec
        u = kernels.uniform(rng.keys("known", Draw.CONDITIONED), len(codec.columns) + 2)
        share = torch.where(u[:, :1] <= self.config.conditioning_prob, u[:, 1:2], 0.0)
        known = dict(zip(codec.columns, (u[:, 2:] <= share).unbind(1), strict=True))
        names = {"num": codec.numbers, "cat": codec.tokens}
        return {m: torch.stack([known[name] for name in names[m]], 1) for m in self.system.space}

    def _check_same_run(self, folder):
        super()._check_same_run(folder)
        saved = TableCodec.from_json(json.loads((folder / "codec.json").read_text(encoding="utf-8")))
        if saved.to_json() != self.codec.to_json():  # an older file may lack what has a default
            raise CheckpointError(f"{self.out} holds a run of another table: choose another --out")
