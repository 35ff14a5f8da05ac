"""`TablePipeline`: a trained table model, its config, space, network and codec of columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from ...configs.load import load_config
from ...configs.runs import WEIGHTS, CheckpointError, resolve
from ...configs.table import TableConfig
from ...diffusion import Space
from ...diffusion.build import build_table_space
from ...model.build import build_table_network
from ...model.codecs.table.codec import TableCodec
from ...model.storage import load_weights, pack_json
from ...model.table_dit import TableDiT
from ..steppers import Sampler


@dataclasses.dataclass
class TablePipeline:
    """A configured table model: modalities `num` (numerical columns, z-scores) and `cat` (categorical ones, tokens),
    whichever the table has."""

    config: TableConfig
    space: Space
    net: TableDiT
    codec: TableCodec

    @classmethod
    def from_pretrained(
        cls, path: str | Path, weights: str = "ema", device: torch.device | str = "cpu"
    ) -> TablePipeline:
        """The table model saved in a run folder (its newest checkpoint) or in a checkpoint folder.

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
        pipeline = build_table_pipeline(load_config(folder / "config.yaml", model=TableConfig), codec)
        load_weights(pipeline.net, folder / WEIGHTS[weights])
        pipeline.net.to(device).eval()
        return pipeline

    @property
    def samplers(self) -> dict[str, Sampler]:
        """{modality: its configured sampler}."""
        settings = {"num": self.config.numerical.sampler, "cat": self.config.categorical.sampler}
        return {m: Sampler(settings[m].method, settings[m].time_grid) for m in self.space}

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint besides weights and config, {name: content}: the codec."""
        return {"codec.json": pack_json(self.codec.to_json())}


def build_table_pipeline(config: TableConfig, codec: TableCodec) -> TablePipeline:
    """The model that a config describes for the columns of a codec, with weights drawn from the config's seed."""
    space = build_table_space(config, len(codec.numerical), codec.states)
    return TablePipeline(config, space, build_table_network(config, codec), codec)
