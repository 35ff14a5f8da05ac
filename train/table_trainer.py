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
from .data.table_data import TableData
from .objective import Objective
from .trainer import Trainer


class TableTrainer(Trainer):
    """Trains a table model into a run folder; see `Trainer`."""

    config: TableConfig
    pipeline: TablePipeline

    def __init__(self, config: TableConfig, out: Path, codec: TableCodec, tokens: Tensor, z: Tensor, **options):
        self.codec = codec
        device = torch.device(options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
        data = TableData(tokens, z, device)
        super().__init__(config, out, device, (data, data), **options)

    def build(self) -> TablePipeline:
        return build_table_pipeline(self.config, self.codec)

    def in_bf16(self) -> bool:
        """Only with train.precision=bf16: layers this narrow gain nothing from it, and numbers lose digits."""
        return self.config.train.precision == "bf16"

    def objective(self, net: nn.Module) -> Objective:
        config, space = self.config, self.pipeline.space
        losses = {"num": config.numerical.loss, "cat": config.categorical.loss}
        weighting = nn.ModuleDict()
        for m, process in space.items():  # the configured scale is per column
            loss = losses[m]
            weighting[m] = Weighting(process, loss.weighting, loss.scale * process.shape[0], loss.gamma)
        observed = self.observed if config.conditioning_prob > 0 else None
        return Objective(net, weighting, space, space, observed)

    def learned(self) -> list[str]:
        return list(self.pipeline.space)

    def observed(self, rng: Rng) -> dict[str, Tensor]:
        """{modality: (B, C) bool}: in a share `conditioning_prob` of the rows, random columns are clean conditions.

        Each of these rows draws the probability of its columns; a column's token and its number go together.
        """
        codec = self.codec
        u = kernels.uniform(rng.keys("known", Draw.CONDITIONED), len(codec.columns) + 2)
        prob = torch.where(u[:, :1] <= self.config.conditioning_prob, u[:, 1:2], 0.0)
        observed = dict(zip(codec.columns, (u[:, 2:] <= prob).unbind(1), strict=True))
        names = {"num": codec.numerical, "cat": codec.categorical}
        return {m: torch.stack([observed[name] for name in names[m]], 1) for m in self.pipeline.space}

    def check_same_run(self, folder: Path) -> None:
        super().check_same_run(folder)
        saved = TableCodec.from_json(json.loads((folder / "codec.json").read_text(encoding="utf-8")))
        if saved.to_json() != self.codec.to_json():  # an older file may lack what has a default
            raise CheckpointError(f"{self.out} holds a run of another table: choose another --out")
