"""The ablation of decoupled times: training times and conditions of each variant, stored results, claims."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from anystate.bench.studies.schedule_tables import (
    CLAIMS,
    METRICS,
    VARIANTS,
    VariantResult,
    claims_table,
    results_table,
    verdict,
)
from anystate.bench.studies.schedules import ReplacementSpace, compare_schedules, config_of, times_of
from anystate.configs.load import load_config
from anystate.diffusion import Cosine, Gaussian, LogLinear, Masked, Space, TimeSampler
from anystate.kernels import Rng
from anystate.sample import Sampler, sample

TINY = [
    "modalities.image.stream.width=16", "modalities.text.stream.width=16", "network.depth=1", "network.heads=2",
    "network.head_dim=8", "train.batch=16", "train.steps=4", "train.warmup_steps=2", "sample.steps=3",
]  # fmt: skip


@pytest.fixture
def space():
    return Space({"image": Gaussian((4,), Cosine(), 1e-3, "time"), "text": Masked(6, 3, LogLinear(), 1e-3)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_times_of_each_variant(variant, space):
    """The square, the diagonal, or the diagonal and one edge, half of the samples each."""
    settings = times_of(variant, "image", "text")
    t, loss_mask = TimeSampler(**settings.model_dump())(space, Rng(0, torch.arange(4000)))
    image, text = t["image"], t["text"]
    tied = (image - text).abs() < 1e-9
    clean_text, clean_image = text == 1e-3, image == 1e-3
    if variant == "decoupled":
        assert tied.sum() == 0
        assert abs(torch.corrcoef(torch.stack([image, text]))[0, 1]) < 0.05
    if variant == "unified":
        assert tied.all()
    if variant == "image_only":
        assert (tied | clean_text).all()
        assert abs(clean_text.float().mean() - 0.5) < 0.05
        assert loss_mask["image"].all()
        assert torch.equal(loss_mask["text"] == 0, clean_text)
    if variant == "text_only":
        assert (tied | clean_image).all()
        assert abs(clean_image.float().mean() - 0.5) < 0.05
        assert loss_mask["text"].all()
    for m in t:  # where a modality is trained, its times are uniform
        learned = t[m][loss_mask[m] > 0]
        assert abs(learned.mean() - 0.5) < 0.03
        assert learned.min() < 0.02
        assert learned.max() > 0.98


def test_variants_differ_in_times_only():
    whole = load_config("schedules/digits", ["seed=1"]).model_dump(exclude={"times"})
    for variant in VARIANTS:
        assert config_of(variant, 1, "schedules/digits", []).model_dump(exclude={"times"}) == whole
    with pytest.raises(ValueError, match="'both'"):
        times_of("both", "image", "text")


@pytest.mark.parametrize("condition", ["image", "text"])
def test_replacement_uses_equal_times(condition, space):
    """The network sees equal times, and the condition noised to that time."""
    n, seen = 600, []

    def net(x, t, mask=None, outputs=None):
        assert torch.equal(t["image"], t["text"])
        masked = (x["text"] == 3).float().mean()
        seen.append((float(t["text"][0]), float(masked), float(x["image"].var())))
        zeros = {"image": x["image"] * 0.0, "text": torch.zeros(*x["text"].shape, 3)}
        return {m: zeros[m] for m in outputs}

    clean = {"image": torch.full((n, 4), 3.0), "text": torch.ones(n, 6, dtype=torch.int64)}[condition]
    tied = ReplacementSpace(space, condition, Rng(0, torch.arange(n)))
    samplers = {"image": Sampler("euler"), "text": Sampler("ancestral")}
    out = sample(net, tied, {condition: clean}, n=n, batch_size=n, steps=10, samplers=samplers)
    assert torch.equal(out[condition], clean)
    assert [round(time, 3) for time, _, _ in seen] == [round(1 - k * 0.999 / 9, 3) for k in range(10)]
    if condition == "text":
        assert all(abs(masked - time) < 0.05 for time, masked, _ in seen)
    else:
        truth = [float(Cosine().sigma(torch.tensor(time)) ** 2) for time, _, _ in seen]
        assert all(abs(variance - sigma2) < 0.1 for (_, _, variance), sigma2 in zip(seen, truth, strict=True))


def run(out, seeds=1, variants=VARIANTS, n=20, overrides=TINY):
    console = Console(record=True, width=200, file=io.StringIO())
    rows = compare_schedules(
        "schedules/digits", list(overrides), list(variants), seeds, n, out, torch.device("cpu"), console
    )
    return rows, console.export_text()


def test_runs_and_resumes(tmp_path):
    rows, shown = run(tmp_path, variants=["decoupled", "image_only"])
    assert [(row.variant, row.seed) for row in rows] == [("decoupled", 0), ("image_only", 0)]
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["real"]["agreement"] > 0.95
    assert record["environment"]["versions"]["torch"]
    assert "needs two seeds" in shown
    more, shown = run(tmp_path, seeds=2)
    assert more[:2] == rows
    assert len(more) == 8
    assert "decoupled is best on images" in shown
    assert "real held-out pairs" in shown
    with pytest.raises(ValueError, match="choose another --out"):
        run(tmp_path, n=21)
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold results of this benchmark"):
        run(tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="--seeds must be at least 1"):
        run(tmp_path, seeds=0)
    with pytest.raises(ValueError, match="variant must be one of"):
        run(tmp_path, variants=["none"])


@pytest.mark.parametrize(
    ("name", "better", "worse", "word"),
    [
        ("text_valid", (0.9, 0.01), (0.5, 0.01), "holds"),
        ("text_valid", (0.5, 0.01), (0.9, 0.01), "fails"),
        ("text_valid", (0.55, 0.1), (0.5, 0.1), "open"),
        ("image_frechet", (1.0, 0.1), (2.0, 0.1), "holds"),
        ("image_frechet", (2.0, 0.1), (1.0, 0.1), "fails"),
    ],
)
def test_verdicts(name, better, worse, word):
    got, difference, error, pair = verdict({"a": (*better, 3), "b": (*worse, 3)}, name, ["a"])
    assert got == word
    assert pair == ("a", "b")
    assert abs(difference) == pytest.approx(abs(better[0] - worse[0]))
    assert error == pytest.approx(2 * (better[1] ** 2 / 3 + worse[1] ** 2 / 3) ** 0.5)


def test_verdict_compares_the_closest_pair():
    stats = {"a": (0.9, 0.01, 3), "b": (0.5, 0.01, 3), "c": (0.89, 0.01, 3)}
    word, *_, pair = verdict(stats, "text_valid", ["a"])
    assert (word, pair) == ("open", ("a", "c"))


def test_tables_without_all_variants():
    rows = [VariantResult("decoupled", 0, 1.0, 0.9, 0.8, 0.7, 0.6, 10.0)]
    assert results_table(rows, {}).row_count == 2
    assert claims_table(rows).row_count == 0
    assert all(name in METRICS for _, name, _, _ in CLAIMS)
