"""Graphed evaluations, with a stand-in for the capture that keeps its rule: results lie where they lay first."""

from __future__ import annotations

import pytest
import torch

from anystate.kernels import Logits
from anystate.sample import graphs, sample
from anystate.train.build import build

CUDA = torch.cuda.is_available()


@pytest.fixture
def system(tiny):
    made = build(tiny("modalities.text.attend_pads=false"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    made.net.to("cuda" if CUDA else "cpu").eval()
    return made


@pytest.fixture
def counted(monkeypatch):
    """Captures by running again into the first result's memory, and counts captures and replays."""
    counts = {"captured": 0, "replayed": 0}

    def capture(function):
        first = function()
        counts["captured"] += 1

        def replay():
            counts["replayed"] += 1
            for m, new in function().items():
                old = first[m]
                (old.hidden if isinstance(old, Logits) else old).copy_(new.hidden if isinstance(new, Logits) else new)

        return replay, first

    if not CUDA:
        monkeypatch.setattr(graphs, "capture", capture)
    return counts


def draw(system, net, given):
    return sample(
        net,
        system.space,
        given,
        n=4,
        steps=5,
        guidance=system.guidance(bool(given)),
        samplers={**system.samplers},
        device="cuda" if CUDA else "cpu",
    )


@pytest.mark.parametrize("given", [False, True])
def test_graphed_evaluations_give_the_same_samples(system, counted, given):
    known = {"text": torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(1))} if given else {}
    eager, graphed = draw(system, system.net, known), draw(system, graphs.GraphedNet(system.net), known)
    assert torch.equal(eager["text"], graphed["text"])
    torch.testing.assert_close(eager["image"], graphed["image"])
    if not CUDA:
        assert 1 <= counted["captured"] <= 3
        assert counted["replayed"] >= 5


def test_a_failed_capture_runs_eagerly_and_says_so(system, monkeypatch, caplog):
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuse)
    drawn = draw(system, graphs.GraphedNet(system.net), {})
    assert torch.equal(drawn["text"], draw(system, system.net, {})["text"])
    assert sum("runs eagerly: operation not permitted" in r.message for r in caplog.records) >= 1
    assert not any("more" in r.message for r in caplog.records)


def test_rows_picked_by_number_are_not_graphed():
    x = {"a": torch.zeros(2, 3)}
    inputs = {"x": x, "t": {"a": torch.zeros(2)}, "mask": {}}
    assert graphs.signature(inputs, {"a": torch.tensor([0])}) is None
    whole, half = graphs.signature(inputs, {"a": None}), graphs.signature(inputs, {"a": slice(0, 1)})
    assert whole != half
