"""Conditions that restrict the rows, with the exact score in the place of a network: the sampler alone is tested.

Two numbers z ~ N(0, Σ) with correlation 0.8, and a group that is "b" with probability Φ(z₀ − 2 z₁). Every test of a
distribution compares a mean with that of the true rows that satisfy the conditions; it fails a correct sampler once in
10,000 seeds (|z| < 3.9 of each).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtr

from anystate.configs.load import load_config
from anystate.model.build import build_codecs
from anystate.sample.pipeline import build_pipeline
from anystate.sample.table import restricted
from anystate.sample.table.rows import TableSampler

SIGMA = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, -2.0], dtype=torch.float64)


def true_z(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (n, 2) and groups (n,) of the law."""
    r = np.random.default_rng(seed)
    z = r.multivariate_normal([0, 0], SIGMA.numpy(), n)
    return z, np.where(r.random(n) < ndtr(z @ WEIGHT.numpy()), "b", "a")


class Exact(torch.nn.Module):
    """The exact ε-prediction and logits; a number that is observed is one without noise."""

    observes = ("num",)

    def __init__(self, space):
        super().__init__()
        self.space, self.nothing = space, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, mask=None, outputs=None, observed=None):
        z, schedule = x["num"].double(), self.space["num"].schedule
        known = torch.zeros_like(z, dtype=torch.bool) if observed is None else observed["num"]
        alpha = torch.where(known, 1.0, schedule.alpha(t["num"])[:, None])
        sigma = torch.where(known, 1e-4, schedule.sigma(t["num"])[:, None])
        cross = alpha[:, :, None] * SIGMA  # Cov(z_t, z)
        cov = cross * alpha[:, None, :] + torch.diag_embed(sigma**2)
        gain = torch.linalg.solve(cov, cross).transpose(1, 2)  # E[z | z_t] = gain z_t
        spread = SIGMA - gain @ cross
        slope = (WEIGHT @ gain) / (1.0 + torch.einsum("i,bij,j->b", WEIGHT, spread, WEIGHT))[:, None].sqrt()
        at = (slope * z).sum(1, keepdim=True)
        group = x["cat"]
        sign = torch.where(group == 1, 1.0, -1.0) * (group < 2)
        inverse_mills = torch.exp(-0.5 * at**2 - torch.special.log_ndtr(sign * at)) / (2 * torch.pi) ** 0.5
        score = -torch.linalg.solve(cov, z[..., None])[..., 0] + sign * inverse_mills * slope
        out = {"num": -sigma * score, "cat": torch.stack([*map(torch.special.log_ndtr, (-at, at))], -1)}
        return {m: value.float() for m, value in out.items() if outputs is None or m in outputs}


@pytest.fixture(scope="module")
def sampler() -> TableSampler:
    z, group = true_z(20_000, 0)
    table = pd.DataFrame({"x": z[:, 0], "y": z[:, 1], "group": group})
    config = load_config("table/default", ["numerical.prediction_type=epsilon", "noise=iid"])
    codecs = build_codecs(config)
    codecs["row"].fit(table)
    pipeline = build_pipeline(config, codecs)
    pipeline.net = Exact(pipeline.space)
    return TableSampler(pipeline, steps=50, seed=1)


@pytest.fixture(scope="module")
def truth(sampler) -> pd.DataFrame:
    z, group = true_z(1_500_000, 1)
    columns = sampler.codec.columns
    x, y = (columns[name].quantiles.decode(z[:, i]) for i, name in enumerate(("x", "y")))
    return pd.DataFrame({"x": x, "y": y, "group": group})


def away(made: pd.DataFrame, true: pd.DataFrame) -> dict[str, float]:
    """Differences of means in standard errors: of the numbers, their product and the share of the group."""

    def features(t: pd.DataFrame) -> pd.DataFrame:
        centred = t[["x", "y"]] - true[["x", "y"]].mean()
        return centred.assign(xy=centred["x"] * centred["y"], b=(t["group"] == "b") * 1.0)

    a, b = features(made), features(true)
    error = (b.var() * (1 / len(a) + 1 / len(b))) ** 0.5
    return ((a.mean() - b.mean()) / error.where(error > 0, 1.0)).to_dict()


CONDITIONS = {
    "nothing excluded": ({"x": (-9, 9), "y": (-9, 9)}, lambda t: t["x"] > -99),
    "two ranges": ({"x": (0, 1), "y": (None, 0.5)}, lambda t: t["x"].between(0, 1) & (t["y"] <= 0.5)),
    "range and group": ({"x": (0.5, None), "group": "b"}, lambda t: (t["x"] >= 0.5) & (t["group"] == "b")),
    "a list of ranges": (
        {"x": [(-1, -0.5), (1, 2)], "group": "!=a"},
        lambda t: (t["x"].between(-1, -0.5) | t["x"].between(1, 2)) & (t["group"] == "b"),
    ),
    "rare": (
        {"x": (1.0, 1.2), "y": (0.0, 0.3), "group": "a"},
        lambda t: t["x"].between(1, 1.2) & t["y"].between(0, 0.3) & (t["group"] == "a"),
    ),
    "opposite tails": ({"x": (1.0, None), "y": (None, -0.3)}, lambda t: (t["x"] >= 1) & (t["y"] <= -0.3)),
    "rare range": ({"y": (2.2, 2.4), "group": "b"}, lambda t: t["y"].between(2.2, 2.4) & (t["group"] == "b")),
}


RARE = ("rare", "opposite tails", "rare range")  # shares of about 0.1%


@pytest.mark.parametrize("name", CONDITIONS)
def test_rows_follow_the_restricted_joint_distribution(sampler, truth, name):
    where, satisfied = CONDITIONS[name]
    made, true = sampler.sample(200 if name in RARE else 500, where), truth[satisfied(truth)]
    assert satisfied(made).all()
    assert max(map(abs, away(made, true).values())) < 3.9


@pytest.mark.parametrize("name", ["two ranges", "range and group", "a list of ranges"])
def test_rows_made_by_splitting_follow_it_too(sampler, truth, name, monkeypatch):
    """As above, without further attempts: every row that does not fit at once is made by splitting."""
    monkeypatch.setattr(restricted, "ATTEMPTS", 0)
    monkeypatch.setattr(restricted, "LEAST_ATTEMPTS", 0)
    where, satisfied = CONDITIONS[name]
    made, true = sampler.sample(400, where), truth[satisfied(truth)]
    assert satisfied(made).all()
    assert max(map(abs, away(made, true).values())) < 3.9


def test_a_condition_that_excludes_nothing_changes_nothing(sampler):
    plain = sampler.sample(300)
    pd.testing.assert_frame_equal(sampler.sample(300, {"x": (-99, 99), "group": ["a", "b"]}), plain)
    kept = sampler.sample(300, {"x": (0, None)})
    fits = plain["x"] >= 0
    pd.testing.assert_frame_equal(kept[fits], plain[fits])


def test_narrow_ranges_hold_exactly(sampler):
    for width in (1e-3, 1e-12):
        x = sampler.sample(100, {"x": (0.1, 0.1 + width)})["x"]
        assert x.between(0.1, 0.1 + width).all()


def test_a_network_without_observed_numbers_needs_no_other_way(sampler, monkeypatch):
    monkeypatch.setattr(Exact, "observes", ())
    for low, high in ((0, 1), (0.1, 0.1001)):
        assert sampler.sample(20, {"x": (low, high)})["x"].between(low, high).all()
