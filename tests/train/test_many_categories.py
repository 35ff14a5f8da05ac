"""Columns of many categories: their own logits, what depends on them, and what is pooled."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare

from anystate import TableSynthesizer
from anystate.kernels import LazyLogits, Rng
from anystate.model import column_layers
from anystate.model.column_layers import CategoricalHead

STATES = (3, 700, 2, 5, 300)
LEARNT = ["network.width=32", "network.depth=1", "network.heads=2", "train.batch=256", "train.steps=300"]
LEARNT += ["train.lr=1e-2", "sample.steps=4", "compile=never", "train.log_every=300"]


@pytest.fixture
def logits(monkeypatch):
    """(`ColumnLogits`, the same as one padded tensor), both with gradients to their head."""
    torch.manual_seed(0)
    head = CategoricalHead(STATES, 16, deep=False, mask_logit=False)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    x = torch.randn(64, len(STATES), 16)
    grouped = head(x)
    head.is_grouped = False
    return head, grouped, LazyLogits(head(x))


def test_groups_of_columns_have_the_logits_of_a_padded_tensor(logits):
    head, grouped, padded = logits
    assert [group.bias.shape[-1] for group in grouped.groups] == [5, 700, 300]
    torch.testing.assert_close(grouped.values(), padded.values())
    target = torch.stack([torch.randint(-1, k, (64,)) for k in STATES], 1)
    gradients = []
    for out in (grouped, padded):
        losses = out.cross_entropy(target, 700)
        gradients.append((losses, *torch.autograd.grad(losses.square().sum(), list(head.parameters()))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    allowed = torch.rand(len(STATES), 700) < 0.5
    allowed[:, :2] = True
    torch.testing.assert_close(grouped.restrict(allowed).values(), padded.restrict(allowed).values())
    u, wanted = torch.rand(64, len(STATES)), torch.rand(64, len(STATES)) < 0.4
    a, b = (out.at_uniforms(u, 700, wanted) for out in (grouped, padded))
    assert torch.equal(a[wanted], b[wanted])
    assert torch.equal(grouped[3:9].values(), grouped.values()[3:9])


def test_drawn_states_have_their_probabilities(logits):
    """χ² tests of every column; they fail by chance once in 10,000 runs."""
    _, grouped, _ = logits
    n = 40_000
    grouped.hidden = grouped.hidden[:1].expand(n, -1, -1).detach()
    tokens = torch.full((n, len(STATES)), 700)
    tokens[:100] = 1
    drawn = grouped.tau_leap(tokens, torch.ones(n), Rng.for_batch(5, n).keys("cat", 0), 700, "last", False)
    assert (drawn[:100] == 1).all()
    p = grouped[:1].values()[0].softmax(-1).detach().double().numpy()
    for c, k in enumerate(STATES):
        expected = p[c, :k] * (n - 100)
        counts = np.bincount(drawn[100:, c].numpy(), minlength=k)
        often = expected > 5
        seen, mean = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
        keep = mean > 0
        assert chisquare(seen[keep], mean[keep] * seen.sum() / mean.sum()).pvalue > 1e-4 / len(STATES)


def places(n: int = 4000, k: int = 300, seed: int = 0) -> pd.DataFrame:
    r = np.random.default_rng(seed)
    place = r.integers(0, k, n)
    state = np.random.default_rng(1).integers(0, 6, k)[place]
    return pd.DataFrame({"place": [f"p{i:03d}" for i in place], "state": [f"s{i}" for i in state]})


def test_more_than_256_categories_determine_another_column(caplog):
    """300 places in 6 states: none is pooled, and a place has its state, as in all rows of training."""
    table = places()
    model = TableSynthesizer(overrides=LEARNT, device="cpu").fit(table)
    assert not caplog.messages
    state_of = dict(zip(table["place"], table["state"], strict=True))
    made = model.sample(2000)
    assert (
        made["place"].map(state_of) == made["state"]
    ).mean() > 0.9  # 1/6 by chance; the last wrong ones need longer training
    assert made["place"].nunique() > 290  # 299.6 in 2,000 draws of the law
    assert (model.sample(20, where={"place": "p123"})["state"] == state_of["p123"]).mean() > 0.8
    mode, _ = model.impute(table.head(200).assign(state=None), "expected", draws=2)
    assert (mode["state"] == table["state"].head(200)).mean() > 0.9
    filled = model.impute(table.head(200).assign(place=None))
    assert (filled["place"].map(state_of) == filled["state"]).mean() > 0.8


def test_what_is_pooled_is_said(caplog):
    table = pd.DataFrame({"a": [f"c{i // 4}" for i in range(400)] + ["often"] * 100})
    settings = [*LEARNT, "train.steps=1", "modalities.row.encoding.max_categories=51"]
    model = TableSynthesizer(overrides=settings, device="cpu").fit(table)
    assert caplog.messages == [
        "column 'a' has 101 categories: the 51 rarest, of 204 rows, are one to the model, which draws among them "
        "whatever the rest of the row is; encoding.max_categories=N keeps N apart"
    ]
    assert len(model.columns_.columns["a"].states) == 51


def test_a_network_of_columns_with_many_states_may_be_compiled(monkeypatch):
    monkeypatch.setattr(column_layers, "LARGE", 4)
    head = CategoricalHead((3, 9), 8, deep=True, mask_logit=False)
    torch.nn.init.normal_(head.weight)
    x, target = torch.randn(5, 2, 8), torch.randint(0, 3, (5, 2))

    def loss(x):
        return head(x).cross_entropy(target, 9).sum()

    explained = torch._dynamo.explain(loss)(x)
    assert explained.graph_break_count == 0
