"""`anystate bench data`: every loader gets the same synthetic samples, and the table shows its speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from anystate.bench.speed import data as bench
from anystate.configs.load import load_config
from anystate.train.data.packed.match import stored_specs
from anystate.train.data.packed.packed import Packed


def test_files_and_shards_hold_the_same_samples(tmp_path):
    bench.write_data(tmp_path, 12, Console(quiet=True))
    files = bench.NpyFiles(tmp_path, 12)
    packed = Packed(tmp_path, bench.codecs_of_recipe(), loader="webdataset")
    examples = packed.examples()
    assert len(files) == len(examples) == 12
    held = examples.first(slice(None))
    for i in range(12):
        x, tokens = files[i]
        assert x.shape == held["image"][i].shape == (4, 32, 32)
        assert tokens.shape == (120,)
        assert torch.equal(tokens, held["text"][i])
        stored = np.load(tmp_path / f"images/0000/{i}.npy")
        assert np.allclose(packed.shards.read(0, i)["image"], stored, atol=2e-3)
        assert np.allclose(held["image"][i], stored[:4] * 0.18215, atol=1e-3)
    recipe = stored_specs(load_config(bench.RECIPE), bench.codecs_of_recipe())
    assert {m: about.specs for m, about in packed.manifest.modalities.items()} == recipe


def test_every_loader_is_measured(tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    loaders = bench.run(16, 4, 2, 2, tmp_path, tmp_path / "rows.json", Console(width=200))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["engine"] for r in rows] == ["plain", *(loader.name for loader in loaders)]
    official = max(r["value"] for r in rows if r["engine"].startswith("files"))
    for row, loader in zip(rows[1:], loaders, strict=True):
        assert len(loader.rates) == 2
        assert min(loader.rates) > 0
        assert row["value"] == loader.median
        assert row["ratio_to_plain"] == loader.median / official
    assert "ratio to the best official" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
