"""Official table checkpoints: columns and categories are mapped correctly, and samples are rows of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.preprocessing import OrdinalEncoder, QuantileTransformer

from anystate.configs.load import load_config
from anystate.model.official.import_table import import_table, official_codec, read_official_table
from anystate.model.official.table import is_table
from anystate.sample.pipeline import Pipeline
from anystate.sample.table.cells import columns_of
from anystate.train.synthesizer import TableSynthesizer

# of a network with 4 numbers and 3, 7 and 2 categories: the target is a category, and first
ROLES = {"numerical": ["a", "b", "c", "d"], "categorical": ["seven", "flag"], "target": "class", "task": "binclass"}


def rows(n: int = 900) -> pd.DataFrame:
    r = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "d": r.integers(0, 5, n),
            "seven": r.choice([-2, -1, 0, 1, 2, 10, 11], n),  # sorted as numbers, not as text
            "a": r.standard_normal(n).round(3),
            "class": r.choice([" <=50K", " >50K", " ?"], n),
            "flag": r.choice(["True", "False"], n),
            "b": r.gamma(2.0, 100.0, n),
            "c": np.where(r.random(n) < 0.9, 0, r.integers(1, 99999, n)),
        }
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    where = tmp_path / "set"
    where.mkdir()
    rows().to_csv(where / "train.csv", index=False)
    (where / "schema.yaml").write_text(yaml.safe_dump(ROLES))
    return where


@pytest.fixture
def weights(golden_table) -> dict:
    return golden_table("one_time").below("weights/")


def snapshot(tmp_path: Path, **content) -> Path:
    torch.save(content, tmp_path / "model_0029999.pt")
    return tmp_path / "model_0029999.pt"


@pytest.mark.parametrize("case", ["one_time", "two_time"])
def test_an_imported_network_predicts_as_the_official_one(tmp_path, folder, golden_table, case):
    golden = golden_table(case)
    config, state = golden.config["model"], golden.below("weights/")
    slots = {"state": {0: {"step": torch.tensor(77.0)}}, "param_groups": []}
    report = import_table(
        snapshot(tmp_path, model=state, ema={k: 0.5 * v for k, v in state.items()}, opt=slots),
        tmp_path / "run",
        folder,
        overrides=[f"network.heads={config['num_heads']}"],
    )
    assert report.folder.name == "step_00000077"
    assert report.weights == ["ema", "raw"]
    assert not report.unused
    assert set(report.used) == set(state)
    pipeline = Pipeline.from_pretrained(tmp_path / "run", "raw")
    assert columns_of(pipeline).numerical == ["d", "a", "b", "c"]
    assert columns_of(pipeline).categorical == ["seven", "class", "flag"]
    numerical, categorical = [3, 0, 1, 2], [1, 0, 2]  # official indices of our columns
    mask = torch.tensor(config["categories"])[categorical]
    x_cat = golden["forward/x_cat"][:, categorical]
    x = {"num": golden["forward/x_num"][:, numerical], "cat": torch.where(x_cat == mask, mask.max(), x_cat)}
    times = {"num": golden["forward/t"], "cat": golden["forward/s"]}
    with torch.no_grad():
        out = pipeline.net(x, times)
    torch.testing.assert_close(out["num"], golden["forward/num"][:, numerical], rtol=1e-5, atol=1e-5)
    for c, place in enumerate(categorical):
        k = config["categories"][place]
        mine = torch.cat([out["cat"][:, c, :k], out["cat"][:, c, -1:]], -1)
        torch.testing.assert_close(mine, golden[f"forward/cat_{place}"], rtol=1e-5, atol=1e-5)
    ema = Pipeline.from_pretrained(tmp_path / "run").net.state_dict()
    assert all(torch.equal(0.5 * value, ema[key]) for key, value in pipeline.net.state_dict().items())


def test_numbers_and_categories_are_encoded_as_by_scikit_learn(folder):
    official, table = read_official_table(folder), rows()
    assert official.categorical == ["class", "seven", "flag"]
    codec = official_codec(official, load_config("table/paper"))
    tokens, _ = codec.encode(table)
    theirs = OrdinalEncoder(dtype="int64").fit_transform(table[codec.categorical].astype(object))
    assert (tokens.numpy() == theirs).all()
    transform = QuantileTransformer(output_distribution="normal", n_quantiles=30).fit(table[codec.numerical])
    z = 2.5 * np.random.default_rng(1).standard_normal((4000, 4)).astype(np.float32)
    expected = transform.inverse_transform(z.astype(np.float64))
    for c, name in enumerate(codec.numerical):
        made = codec.columns[name].decode(None, z[:, c], len(z), None).to_numpy(np.float64)
        truth = np.round(expected[:, c], {"a": 3, "b": 12}.get(name, 0))
        step = {"a": 1.001e-3, "b": 1e-5 * np.ptp(truth)}.get(name, 1.0)  # a rounding may fall either way
        assert np.abs(made - truth).max() <= step
        assert (made == truth).mean() > 0.97 or name == "b"


def test_rows_of_an_imported_network_are_rows_of_the_table(weights, tmp_path, folder):
    file = snapshot(tmp_path, **{"ema": weights})
    import_table(file, tmp_path / "run", folder, overrides=["sample.steps=4"])
    made, real = TableSynthesizer.load(tmp_path / "run").sample(50), rows()
    assert list(made) == list(real)
    assert (made.dtypes == real.dtypes).all()
    assert set(made["class"]) <= set(real["class"])
    assert set(made["seven"]) <= set(real["seven"])
    assert made["c"].between(real["c"].min(), real["c"].max()).all()


def test_the_columns_are_read_from_the_official_info_json(tmp_path, folder):
    names = list(rows())
    (folder / "schema.yaml").unlink()
    info = {"column_names": names, "num_col_idx": [2, 5, 6, 0], "cat_col_idx": [1, 4], "target_col_idx": [3]}
    (folder / "info.json").write_text(json.dumps(info | {"task_type": "binclass"}))
    official = read_official_table(folder)
    assert official.numerical == ["a", "b", "c", "d"]
    assert official.categorical == ["class", "seven", "flag"]
    info |= {"num_col_idx": [2, 5, 6], "target_col_idx": [0], "cat_col_idx": [1, 3, 4], "task_type": "regression"}
    (folder / "info.json").write_text(json.dumps(info))
    assert read_official_table(folder).numerical == ["d", "a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="d"), "lacks column 'd'"),
        (lambda table: table.assign(seven=1), "column 'seven' has 7 values there, 1 here"),
        (lambda table: table.assign(a="x"), "column 'a' should hold numbers"),
    ],
)
def test_the_network_of_another_table_is_refused(weights, tmp_path, folder, change, message):
    change(rows()).to_csv(folder / "train.csv", index=False)
    with pytest.raises(ValueError, match=message):
        import_table(snapshot(tmp_path, ema=weights), tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_checkpoints_of_a_table_are_refused(weights, tmp_path, folder):
    out = tmp_path / "run"
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    for file, message in [(tmp_path / "none.pt", "not found"), (tmp_path / "torn.pt", "not a .pt file")]:
        with pytest.raises(ValueError, match=message):
            import_table(file, out, folder)
    with pytest.raises(ValueError, match="no weights of a table network; it holds model"):
        import_table(snapshot(tmp_path, model={"text_embedder.weight": torch.zeros(2)}), out, folder)
    torch.save({"model": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="pickled code"):
        import_table(tmp_path / "code.pt", out, folder)
    with pytest.raises(ValueError, match="no raw weights"):
        import_table(snapshot(tmp_path, ema=weights), out, folder, "raw")
    with pytest.raises(ValueError, match=r"no folder with a train\.csv"):
        import_table(snapshot(tmp_path, ema=weights), out, tmp_path / "nowhere")
    assert is_table(weights)
    assert not out.exists()
    import_table(snapshot(tmp_path, ema=weights), out, folder)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        import_table(snapshot(tmp_path, ema=weights), out, folder)


def test_adult_from_the_command_line(call, tmp_path, capsys):
    """A network of the official shape for Adult, target first, through `import-official` into `table sample`."""
    from anystate.model.official.table import to_official
    from anystate.model.table_dit import Categorical, Numerical, TableDiT

    states = (2, 9, 16, 7, 15, 6, 5, 2, 42)  # income, then the others in the table's order
    net = TableDiT({"num": Numerical(6), "cat": Categorical(states)}, 24, 4, 4, ["num"])
    assert sum(p.numel() for p in net.parameters()) == 70_194
    state = to_official(net)
    file = snapshot(tmp_path, model=state, ema=state, opt={"state": {}, "param_groups": []})
    run, made = tmp_path / "run", tmp_path / "rows.csv"
    assert call("import-official", file, "sample.steps=2", "--table", "adult", "--out", run) == 0
    assert call("table", "sample", run, "-n", 20, "--out", made, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert f"{len(state)} tensors used, 0 not" in shown
    made = pd.read_csv(made)
    assert made.shape == (20, 15)
    assert made["age"].between(17, 90).all()
    assert set(made["income"]) <= {"<=50K", ">50K"}
