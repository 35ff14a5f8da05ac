"""Runs of an earlier commit load, resume and give the same samples as before; see old_runs/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from anystate.configs.load import dump_config, load_config
from anystate.model.codecs.table.files import read_table
from anystate.sample import Condition, Sampler
from anystate.sample.pipeline import Pipeline
from anystate.train.data.bundled import load_bundled
from anystate.train.synthesizer import TableSynthesizer
from anystate.train.trainer import Trainer

OLD = Path(__file__).parent / "old_runs"
TOLERANCE = 1e-5
KINDS = {
    "heun_tau_leap": {"image": Sampler("heun"), "text": Sampler("tau_leap")},
    "sde_ancestral": {"image": Sampler("euler_sde"), "text": Sampler("ancestral")},
}


@pytest.fixture(params=["old names", "new names"])
def run(request, tmp_path):
    """run("digits") → a copy of that run folder, its configs as they were written or as they are written today."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(OLD / name, folder)
        for file in folder.rglob("config.yaml") if request.param == "new names" else ():
            file.write_text(dump_config(load_config(file)))
        return folder

    return copy


@pytest.fixture(scope="module")
def old():
    return load_file(OLD / "digits_samples.safetensors")


def conditions(old, case: str) -> dict:
    text, image = old["captions"], old["images"]
    cases = {"given_text": {"text": text}, "given_image": {"image": image}}
    cases |= {"half_noised_text": {"text": Condition(text, 0.5)}, "half_noised_image": {"image": Condition(image, 0.3)}}
    return cases.get(case, {})


def test_digits_gives_the_same_samples(run, old):
    pipeline = Pipeline.from_pretrained(run("digits") / "step_00000060")
    cases = dict.fromkeys(name.split("/")[0] for name in old if "/" in name)
    assert len(cases) == 7
    for case in cases:
        other = {"samplers": KINDS[case], "steps": 6} if case in KINDS else {}
        for m, x in pipeline.sample(conditions(old, case), n=5, seed=7, **other).items():
            torch.testing.assert_close(x, old[f"{case}/{m}"], rtol=0, atol=TOLERANCE)


def test_digits_resumes(run):
    folder = run("digits")
    trainer = Trainer(load_config(folder / "config.yaml"), folder, "cpu", quiet=True)
    assert trainer.state.step == 60
    trainer.run()
    same_training(folder, "digits")


def test_table_resumes(run):
    folder, (table, _) = run("table"), load_bundled()
    config = shutil.copy(folder / "config.yaml", folder.with_suffix(".yaml"))
    TableSynthesizer(config, device="cpu", out=folder).fit(as_in_pandas_2(table.iloc[:200]))
    same_training(folder, "table")


def as_in_pandas_2(table: pd.DataFrame) -> pd.DataFrame:
    """The table with text of dtype object, as the run was made; pandas 3 has a dtype for text."""
    text = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.astype(dict.fromkeys(text, object))


def same_training(folder: Path, name: str) -> None:
    """The EMA weights and the last logged losses are those of the uninterrupted run."""
    ema = load_file(folder / "step_00000066" / "ema.safetensors")
    for key, value in load_file(OLD / f"{name}_final_ema.safetensors").items():
        torch.testing.assert_close(ema[key], value, rtol=0, atol=TOLERANCE)
    last, expected = (last_row(path) for path in (folder / "metrics.jsonl", OLD / f"{name}_metrics.jsonl"))
    for key in [key for key in expected if key.startswith("loss/")]:
        assert last[key] == pytest.approx(expected[key], abs=TOLERANCE)


def last_row(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def test_table_gives_the_same_rows(run):
    model = TableSynthesizer.load(run("table") / "step_00000060", device="cpu")
    where = {"education": "Masters", "age": (30, 40), "sex": "Male"}
    same_rows(model.sample(20, seed=3), "joint")
    rows = model.sample(20, where=where, seed=3)  # drawn otherwise at that commit, where a range ignored the rest
    assert rows.age.between(30, 40).all()
    assert (rows.education.eq("Masters") & rows.sex.eq("Male")).all()
    same_rows(model.sample(20, where={"hours.per.week": 40}, balance="sex", seed=3), "balance")
    holes = read_table(OLD / "table_holes.csv")
    same_rows(model.impute(holes, seed=3), "imputed")
    filled, spread = model.impute(holes, how="expected", draws=4, seed=3)
    same_rows(filled, "expected", 1e-4)
    same_rows(spread, "spread", 1e-4)


def same_rows(rows: pd.DataFrame, name: str, rtol: float = 0.0) -> None:
    expected = read_table(OLD / f"table_{name}.csv")
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False, rtol=rtol, atol=TOLERANCE)
