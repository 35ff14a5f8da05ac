"""Table models: fit, sample, condition, balance, impute, save, resume, on small tables."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import anystate
from anystate.configs.load import ConfigError, load_config
from anystate.configs.runs import CheckpointError, resolve
from anystate.kernels import Rng
from anystate.model.build import build_codecs
from anystate.model.codecs.table.schema import Schema
from anystate.sample.pipeline import Pipeline, build_pipeline
from anystate.sample.table.cells import columns_of
from anystate.sample.table.rows import TableSampler
from anystate.train.data.bundled import load_bundled
from anystate.train.data.dataset import InMemory
from anystate.train.data.examples import Examples
from anystate.train.synthesizer import TableSynthesizer
from anystate.train.trainer import Trainer

TINY = [
    "network.width=16",
    "network.depth=1",
    "network.heads=2",
    "train.batch=64",
    "train.steps=6",
    "train.save_every=3",
    "train.log_every=1",
    "train.warmup_steps=2",
    "sample.steps=8",
    "sample.batch_size=64",
]
LEARNT = [*TINY, "train.steps=400", "train.save_every=400", "train.lr=1e-2", "train.log_every=100", "train.batch=128"]


def toy(n: int = 600, seed: int = 0) -> pd.DataFrame:
    """Income follows school, height follows sex; bonus is mostly zero; some cells are empty."""
    r = np.random.default_rng(seed)
    school = r.choice(["none", "high", "college"], n, p=[0.5, 0.4, 0.1])
    sex = r.choice(["f", "m"], n)
    chance = np.select([school == "college", school == "high"], [0.95, 0.5], 0.05)
    income = np.where(r.random(n) < chance, "rich", "poor")
    table = pd.DataFrame(
        {
            "school": school,
            "sex": sex,
            "income": income,
            "age": r.integers(18, 60, n),
            "height": np.round(np.where(sex == "m", 180.0, 165.0) + 5 * r.standard_normal(n), 3),
            "bonus": np.where(r.random(n) < 0.7, 0.0, np.round(r.gamma(2.0, 1000.0, n), 2)),
            "land": "here",
        }
    )
    table["pet"] = np.where(r.random(n) < 0.3, None, r.choice(["cat", "dog"], n)).astype(object)
    return table


@pytest.fixture(scope="module")
def model() -> TableSynthesizer:
    return TableSynthesizer(overrides=LEARNT, device="cpu").fit(toy())


def trainer(out, *overrides, table=None) -> Trainer:
    rows = InMemory({"row": toy() if table is None else table})
    return Trainer(load_config("table/default", [*TINY, *overrides]), out, "cpu", (rows, rows), quiet=True)


def losses(run) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/num"], row["loss/cat"]) for row in rows]


def test_rows_have_the_columns_types_ranges_and_categories_of_the_table(model):
    real, made = toy(), model.sample(200)
    assert list(made) == list(real)
    assert (made.dtypes == real.dtypes).all()
    assert len(made) == 200
    for name in ("school", "sex", "income", "land"):
        assert set(made[name]) <= set(real[name])
    assert made["age"].between(18, 59).all()
    assert made["height"].between(real["height"].min(), real["height"].max()).all()
    assert 0.5 < (made["bonus"] == 0).mean() < 0.9
    assert 0.1 < made["pet"].isna().mean() < 0.5
    assert len(model.sample()) == len(real)


def test_dependence_between_columns_is_learned(model):
    made = model.sample(1500)
    rich = made.groupby("school")["income"].apply(lambda v: (v == "rich").mean())
    assert rich["college"] > rich["high"] > rich["none"]
    tall = made.groupby("sex")["height"].mean()
    assert 8 < tall["m"] - tall["f"] < 22


def test_sample_i_of_a_seed_does_not_depend_on_how_many_are_drawn(model):
    pd.testing.assert_frame_equal(model.sample(100, seed=3).head(64), model.sample(64, seed=3))
    assert not model.sample(64, seed=3).equals(model.sample(64, seed=4))


@pytest.mark.parametrize(
    ("settings", "device", "n", "rows"),
    [
        ([], "cpu", 100_000, 4096),
        ([], "cpu", 100, 100),
        ([], "cuda", 32_561, 32_561),
        ([], "cuda", 100_000, 65_536),
        (["sample.batch_size=512"], "cuda", 32_561, 512),
    ],
)
def test_batch_size_depends_on_the_device_unless_configured(model, settings, device, n, rows):
    sampler = TableSampler(model.pipeline_)
    config = load_config("table/default", settings)
    sampler.pipeline, sampler.device = dataclasses.replace(model.pipeline_, config=config), torch.device(device)
    assert sampler.batch_rows(n) == rows


def test_batch_size_leaves_memory_for_the_logits_of_many_states(model):
    """On a GPU: 100 columns of 512 states make 10,485 rows 2 GiB of logits."""
    sampler = TableSampler(dataclasses.replace(model.pipeline_, config=load_config("table/default")))
    sampler.device = torch.device("cuda")
    sampler.codec = SimpleNamespace(categorical=["a"] * 100, states=[512] * 100)
    assert sampler.batch_rows(100_000) == 2**31 // 4 // (100 * 512)


@pytest.mark.parametrize(("precision", "expected"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_tables_are_trained_in_fp32_on_a_gpu_too(tmp_path, precision, expected):
    made = trainer(tmp_path, f"train.precision={precision}")
    made.device = torch.device("cuda")
    assert made.in_bf16() == expected


def uniforms(model: TableSynthesizer, seed: int, start: int, n: int) -> torch.Tensor:
    return torch.cat(list(model.pipeline_.uniforms(seed, start, n).values()), 1)


def test_uniforms_are_uniform_and_evenly_spread(model):
    """64 rows have one value in each 64th of every column, and a row is a function of (seed, row)."""
    u = uniforms(model, 5, 0, 64)
    strata = (u * 64).long().sort(0).values
    assert torch.equal(strata, torch.arange(64)[:, None].expand_as(strata))
    assert torch.equal(uniforms(model, 5, 24, 8), u[24:32])
    first = torch.cat([uniforms(model, seed, 0, 1) for seed in range(400)])
    assert (first.mean(0) - 0.5).abs().max() < 4 / (12 * 400) ** 0.5
    assert ((first > 0) & (first < 1)).all()


def test_evenly_spread_rows_have_the_same_distribution_and_vary_less(model):
    """The share of women among 128 rows, over seeds: the same mean, a smaller deviation."""
    config = model.pipeline_.config
    row = config.modalities["row"].model_copy(update={"noise": "iid"})
    independent = dataclasses.replace(model.pipeline_, config=config.model_copy(update={"modalities": {"row": row}}))

    def women(pipeline: Pipeline) -> np.ndarray:
        return np.array([(TableSampler(pipeline, seed=s).sample(128)["sex"] == "f").mean() for s in range(30)])

    even, plain = women(model.pipeline_), women(independent)
    assert even.mean() == pytest.approx(plain.mean(), abs=4 * plain.std() / 30**0.5)
    assert even.std() < 0.85 * plain.std()


def test_kernels_and_references_give_the_same_rows(model, monkeypatch):
    where = {"school": "high", "age": (30, 39), "bonus": (0.0, 500.0)}
    plain = model.sample(4, where, steps=3)
    monkeypatch.setenv("ANYSTATE_BACKEND", "triton")
    pd.testing.assert_frame_equal(model.sample(4, where, steps=3), plain)


def test_rows_satisfy_conditions_on_values_and_ranges(model):
    made = model.sample(
        200, where={"school": "college", "age": (30, 39), "height": (170.0, None), "bonus": 0.0, "pet": None}
    )
    assert (made["school"] == "college").all()
    assert made["age"].between(30, 39).all()
    assert made["age"].nunique() > 3
    assert (made["height"] >= 170).all()
    assert (made["bonus"] == 0).all()
    assert made["pet"].isna().all()
    assert (made["income"] == "rich").mean() > 0.75
    made = model.sample(20, where={"height": 171.234, "bonus": (1.0, 2000.0)})
    assert (made["height"] == 171.234).all()
    assert made["bonus"].between(1, 2000).all()


def test_a_range_that_excludes_an_end(model):
    height = np.sort(toy()["height"])
    made = model.sample(60, where={"height": (height[-6], height[-3])})["height"]
    assert made.between(height[-6], height[-3]).all()


def test_a_rare_condition_gets_its_own_conditional_distribution(model):
    tall = model.sample(400, where={"sex": "m"})["height"].mean()
    small = model.sample(400, where={"sex": "f"})["height"].mean()
    assert 8 < tall - small < 22


def test_balance(model):
    counts = model.sample(90, balance="income")["income"].value_counts()
    assert set(counts) == {45}
    assert set(model.sample(90, balance="pet")["pet"].value_counts()) == {45}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"schol": "none"}, "unknown column 'schol'; the table has school, sex"),
        ({"school": "kinder"}, "'school' has no value 'kinder'; it has college, high, none"),
        ({"school": ("a", "b")}, "'school' has no value 'a'"),
        ({"age": (70, 80)}, "'age' has no value in 70..80; its values are from 18 to 59"),
        ({"age": (40, 30)}, "range 40..30 is empty"),
        ({"height": "tall"}, "'height': 'tall' is not a number"),
        ({"sex": None}, "'sex' had no empty cells"),
        ({"land": "here"}, "'land' is constant"),
    ],
)
def test_errors_of_wrong_conditions(model, where, message):
    with pytest.raises(ValueError, match=message):
        model.sample(3, where=where)


def test_errors_of_wrong_balance(model):
    with pytest.raises(ValueError, match="'height' is continuous with many values"):
        model.sample(3, balance="height")
    with pytest.raises(ValueError, match="cannot be balanced and given at once"):
        model.sample(3, where={"sex": "m"}, balance="sex")


def holes(table: pd.DataFrame, share: float = 0.3) -> pd.DataFrame:
    r = np.random.default_rng(1)
    columns = [c for c in table if c != "land"]
    return table.assign(**{c: table[c].mask(r.random(len(table)) < share) for c in columns})


def test_imputing_fills_only_missing_cells(model):
    table = holes(toy(200, seed=5))
    table.index = [7] * 200
    filled = model.impute(table)
    assert not filled.isna().any(axis=None)
    assert filled.index.equals(table.index)
    for name in table:
        known = table[name].notna()
        assert (filled[name][known] == table[name][known]).all()
    assert set(filled["school"]) <= set(toy()["school"])
    drawn = model.impute(table, draws=3)
    assert len(drawn) == 3
    assert not drawn[0].equals(drawn[1])
    pd.testing.assert_frame_equal(drawn[0], filled)
    pd.testing.assert_frame_equal(model.impute(filled), filled)


def test_imputed_cells_depend_on_the_rest_of_the_row(model):
    truth = toy(300, seed=6)
    table = truth.assign(height=np.nan)
    mean, spread = model.impute(table, "expected", draws=8)
    error = np.sqrt(((mean["height"] - truth["height"]) ** 2).mean())
    assert error < 0.9 * truth["height"].std()
    assert spread["height"].between(0.5, 20).mean() > 0.95
    assert spread["school"].isna().all()


def test_imputing_expected_categories(model):
    truth = toy(300, seed=7)
    mode, spread = model.impute(truth.assign(income=None), "expected", draws=9)
    assert (mode["income"] == truth["income"]).mean() > 0.65
    assert spread["income"].between(0, 1).all()
    with pytest.raises(ValueError, match="how must be draw or expected"):
        model.impute(truth, "best")


def test_save_and_load(model, tmp_path):
    model.save(tmp_path / "model")
    again = TableSynthesizer.load(tmp_path / "model", device="cpu")
    pd.testing.assert_frame_equal(again.sample(50, seed=1), model.sample(50, seed=1))
    again.save(tmp_path / "copy")
    pd.testing.assert_frame_equal(TableSynthesizer.load(tmp_path / "copy", device="cpu").sample(9), model.sample(9))
    assert again.feature_names_in_ == list(toy())


def test_scikit_learn_conventions():
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError

    model = anystate.TableSynthesizer(seed=3)
    assert clone(model).get_params()["seed"] == 3
    with pytest.raises(NotFittedError):
        model.sample(3)


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "parts").run(stop=3)
    resumed = trainer(tmp_path / "parts")
    assert resumed.state.step == 3
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"a run on other data \(its row differs\)"):
        trainer(tmp_path / "parts", table=toy(seed=8))


def test_checkpoints_of_other_models_are_refused(tmp_path):
    trainer(tmp_path).run(stop=3)
    assert columns_of(Pipeline.from_pretrained(tmp_path)).rows == 600
    file = tmp_path / "step_00000003/row.codec.json"
    content = file.read_text()
    for damaged in (content[: len(content) // 2], "[]", content.replace('"kind":', '"sort":')):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"step_00000003: row: codec\.json is truncated or damaged"):
            Pipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="lacks a file of a codec: row"):
        Pipeline.from_pretrained(tmp_path)


def test_models_of_other_modalities_are_refused(tiny, tmp_path):
    Trainer(tiny("train.steps=3"), tmp_path, "cpu", quiet=True).run()
    with pytest.raises(CheckpointError, match="not one of a table alone, it has image, text: use anystate sample"):
        TableSynthesizer.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="config digits has the modalities image, text: a table needs one of columns"):
        TableSynthesizer("digits", device="cpu").fit(toy())


def test_observed_columns_stay_clean_and_have_no_loss(tmp_path):
    t = trainer(tmp_path, "conditioning_prob=1.0")
    rng = Rng.for_batch(0, 64)
    observed = t.draw_observed(rng)
    assert 0.3 < observed["cat"].float().mean() < 0.7
    columns = t.codecs["row"].table
    number, token = columns.numerical.index("bonus"), columns.categorical.index("bonus")
    assert torch.equal(observed["num"][:, number], observed["cat"][:, token])
    x0 = t.train_data.batch(0, 0, range(64), 64)
    time = {m: torch.full((64,), 0.9, dtype=torch.float64) for m in x0}
    all_cells = {m: torch.ones_like(v, dtype=torch.bool) for m, v in x0.items()}
    seen = []
    hook = t.state.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lost = t.pipeline.space.losses(t.state.net, x0, time, rng, list(x0), all_cells)
    hook.remove()
    assert all((v == 0).all() for v in lost.values())
    assert all(torch.equal(seen[0][m], x0[m]) for m in x0)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    rows = trainer(tmp_path).train_data
    a, b = rows.batch(0, 5, range(0, 64), 64), rows.batch(0, 5, range(32, 64), 64)
    assert all(torch.equal(a[m][32:], b[m]) for m in a)
    assert not any(v.isnan().any() for v in a.values() if v.is_floating_point())
    epoch = torch.cat([rows.batch(0, k, range(50), 50)["cat"] for k in range(12)])
    assert torch.equal(epoch.sort(0)[0], rows.x["cat"].long().sort(0)[0])


R = np.random.default_rng(0)
TABLES = {
    "all numerical": pd.DataFrame(R.standard_normal((300, 4)), columns=list("abcd")),
    "all categorical": pd.DataFrame(R.choice(list("xyz"), (300, 3)), columns=list("abc")),
    "one column": pd.DataFrame({"a": R.standard_normal(300)}),
    "ten rows": pd.DataFrame({"a": R.standard_normal(10), "b": list("xyxyxyxyxy")}),
    "200 columns": pd.DataFrame(R.integers(0, 5, (60, 200))).rename(columns=lambda i: f"c{i}"),
    "1000 categories": pd.DataFrame({"a": [f"v{i % 1000}" for i in range(1500)], "b": R.standard_normal(1500)}),
    "one row per category": pd.DataFrame({"a": [f"v{i}" for i in range(50)], "b": R.choice(["x", "y"], 50)}),
    "constant and all missing": pd.DataFrame({"a": 1, "b": np.nan, "c": R.standard_normal(50), "d": None}),
    "unicode": pd.DataFrame({"größe": R.standard_normal(50), "猫 🐈": R.choice(["ä", "", "🐈"], 50)}),
    "infinities": pd.DataFrame({"a": R.choice([np.inf, -np.inf, 0.5, 1.5], 100), "b": R.choice(["x", "y"], 100)}),
    "mixed types": pd.DataFrame({"a": R.choice(np.array([1, "1", 2.5, True], dtype=object), 100)}),
}


@pytest.mark.parametrize("name", TABLES)
def test_unusual_tables(name):
    table = TABLES[name]
    overrides = [*TINY, "train.steps=2", "sample.steps=3"]
    made = TableSynthesizer(overrides=overrides, device="cpu").fit(table).sample(12)
    assert list(made) == list(table)
    assert (made.dtypes == table.dtypes).all()
    full = table.columns[table.notna().all()]
    assert made[full].notna().all(axis=None)


def test_a_run_written_before_a_setting_existed_loads_unchanged(tmp_path):
    old = ("network.sinusoids=0", "noise=iid", "encoding.tail_rows=2", "numerical.sampler.time_grid=linear")
    run = trainer(tmp_path, *old)
    run.run()
    file = resolve(tmp_path) / "config.yaml"
    lines = file.read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0].strip() not in ("sinusoids", "noise", "tail_rows")]
    assert len(kept) == len(lines) - 4  # sinusoids of the network, and those of a modality in an mmdit
    before = TableSampler(Pipeline.from_pretrained(tmp_path), seed=1).sample(8)
    file.write_text("\n".join(kept))
    saved = json.loads((file.parent / "row.codec.json").read_text())
    for column in saved["columns"]:
        del column["category_dtype"]  # came later
    (file.parent / "row.codec.json").unlink()
    (file.parent / "codec.json").write_text(json.dumps(saved))  # its earlier name
    pd.testing.assert_frame_equal(TableSampler(Pipeline.from_pretrained(tmp_path), seed=1).sample(8), before)
    again = trainer(tmp_path, *old)
    assert again.state.step == run.state.step


def test_balanced_weighting_and_its_old_name():
    config = load_config(
        "table/default", ["tokens.counted=balanced", "tokens.loss.weighting=none", "tokens.loss.scale=0.5"]
    )
    categorical = config.modalities["row"].categorical
    assert categorical.loss.scale == 0.5
    assert (categorical.loss_on, categorical.loss.weighting) == ("masked", "balanced")


def test_balanced_positions_take_no_further_weight():
    with pytest.raises(ConfigError, match="balanced weighs by itself"):
        load_config("table/default", ["tokens.counted=balanced", "tokens.loss.weighting=elbo"])


def test_the_papers_config_has_the_papers_size_and_sampler():
    table, _ = load_bundled()
    config = load_config("table/paper")
    codecs = build_codecs(config)
    codecs["row"].fit(table)
    pipeline, codec = build_pipeline(config, codecs), codecs["row"].table
    assert len(codec.numerical) == 6
    assert len(codec.categorical) == 9
    assert sum(p.numel() for p in pipeline.net.parameters()) == 70_194
    made = TableSampler(pipeline, steps=4).sample(5)
    assert made.notna().all(axis=None)
    holes = table.head(5).assign(sex=None)
    assert TableSampler(pipeline, steps=4).sample(5, {"sex": "Male"})["sex"].eq("Male").all()
    with pytest.raises(ValueError, match="model trained with them"):
        TableSampler(pipeline, steps=4).impute(holes)


def test_memory_per_batch_does_not_grow_with_the_rows_of_the_table():
    import resource

    n = 1_000_000
    rows = Examples({"num": torch.randn(n, 2), "cat": torch.randint(0, 9, (n, 3))})
    assert rows.x["cat"].element_size() == 2
    rows.batch(0, 0, range(512), 512)  # shuffles the epoch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(1, 200):
        batch = rows.batch(0, step, range(512), 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB
    assert all(x.untyped_storage().nbytes() < 100_000 for x in batch.values())  # copies, not views of the table


def test_expected_values_are_probabilities_and_means_of_many_draws(model):
    holes = toy(40, seed=9).assign(income=None, height=np.nan, bonus=np.nan)
    filled, spread = model.impute(holes, "expected", draws=32)
    draws = model.impute(holes, "draw", draws=120)
    heights = np.stack([d["height"].to_numpy() for d in draws])
    error = filled["height"].to_numpy() - heights.mean(0)
    assert np.abs(error).mean() < 3 * heights.std(0).mean() / np.sqrt(32)
    np.testing.assert_allclose(spread["height"].mean(), heights.std(0).mean(), rtol=0.15)
    bonus = np.stack([d["bonus"].to_numpy() for d in draws])
    np.testing.assert_allclose(filled["bonus"].mean(), bonus.mean(), rtol=0.25)
    rich = np.stack([(d["income"] == "rich").to_numpy() for d in draws]).mean(0)
    sure = np.abs(rich - 0.5) > 0.25
    assert sure.sum() > 10
    assert ((filled["income"] == "rich") == (rich > 0.5))[sure].mean() > 0.9
    assert np.abs(spread["income"][sure] - np.minimum(rich, 1 - rich)[sure]).mean() < 0.12
    twice, _ = model.impute(holes, "expected", draws=32)
    pd.testing.assert_frame_equal(twice, filled)


def test_a_schema_is_given_or_in_the_config(tmp_path):
    """The argument comes before the config's; what neither says is inferred."""
    file = tmp_path / "kinds.yaml"
    file.write_text("columns: [{name: age, kind: categorical}, {name: height}, {name: income}]\ntarget: income\n")
    table, in_config = toy(100), "modalities.row.table_schema={columns: [{name: age, kind: continuous}]}"

    def fitted(*overrides: str, **options) -> TableSynthesizer:
        settings = [*TINY, "train.steps=1", *overrides]
        return TableSynthesizer(overrides=settings, device="cpu", **options).fit(table)

    def kind(model: TableSynthesizer) -> str:
        return model.columns_.columns["age"].column.kind

    assert kind(fitted()) == "integer"
    assert kind(fitted(in_config)) == "continuous"
    assert kind(fitted(f"modalities.row.table_schema={file}")) == "categorical"
    given = fitted(in_config, schema=file)
    assert kind(given) == "categorical"
    assert given.schema_.target == "income"
    assert given.columns_.columns["height"].column.kind == "continuous"
    assert kind(fitted(schema=Schema.load(file))) == "categorical"


def test_a_table_in_an_mmdit(tmp_path):
    """The network of mixes also takes a table alone: rows under conditions, imputation, save and load."""
    network = "network={kind: mmdit, depth: 1, heads: 2, head_dim: 8, time_scale: 100}"
    settings = [s for s in LEARNT if not s.startswith("network.")]
    overrides = [*settings, network, "modalities.row.stream={width: 16}", "train.steps=250", "train.save_every=250"]
    model = TableSynthesizer(overrides=overrides, device="cpu").fit(toy())
    made = model.sample(60, where={"school": "college", "age": (30, 39), "height": 171.234, "bonus": (1.0, 2000.0)})
    assert (made["school"] == "college").all()
    assert made["age"].between(30, 39).all()
    assert (made["height"] == 171.234).all()
    assert made["bonus"].between(1, 2000).all()
    tall = (
        model.sample(200, where={"sex": "m"})["height"].mean() - model.sample(200, where={"sex": "f"})["height"].mean()
    )
    assert tall > 5
    assert set(model.sample(30, balance="income")["income"].value_counts()) == {15}
    filled = model.impute(holes(toy(50, seed=5)))
    assert not filled.isna().any(axis=None)
    mean, spread = model.impute(toy(20, seed=6).assign(height=np.nan), "expected", draws=4)
    assert mean["height"].between(140, 205).all()
    assert (spread["height"] > 0).all()
    model.save(tmp_path / "model")
    again = TableSynthesizer.load(tmp_path / "model", device="cpu")
    pd.testing.assert_frame_equal(again.sample(20, seed=1), model.sample(20, seed=1))


def test_numbers_as_conditions_need_a_network_trained_with_them():
    network = ["network={kind: mmdit, depth: 1, heads: 2, head_dim: 8}", "modalities.row.stream={width: 16}"]
    settings = [s for s in TINY if not s.startswith("network.")]
    overrides = [*settings, *network, "conditioning_prob=0"]
    model = TableSynthesizer(overrides=overrides, device="cpu").fit(toy(100))
    with pytest.raises(ValueError, match=r"fit it with conditioning_prob=0\.25"):
        model.sample(3, where={"height": 170.0})
    assert (model.sample(3, where={"sex": "m"})["sex"] == "m").all()
