"""Graphed evaluations, with a stand-in for the capture that keeps its rule: results lie where they lay first."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from anystate.kernels import LazyLogits, Places, Rng
from anystate.sample import cuda_graphs as graphs
from anystate.sample import sample
from anystate.sample import sampler as engine
from anystate.sample.pipeline import build_pipeline

CUDA = torch.cuda.is_available()


@pytest.fixture
def system(tiny):
    made = build_pipeline(tiny("modalities.text.attend_pads=false"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    made.net.to("cuda" if CUDA else "cpu").eval()
    return made


@pytest.fixture(autouse=True)
def nothing_left_out(monkeypatch):
    """As on a GPU, which never waits to know what changes."""
    monkeypatch.setattr(engine._Run, "changing", lambda self, k, moving: {})


@pytest.fixture
def counted(monkeypatch):
    """Captures by running again into the first result's memory, and counts captures and replays.

    Graphs share memory: a replay leaves no answer of another graph whole.
    """
    counts, answers = {"captured": 0, "replayed": 0}, []

    def capture(function, warm_ups, memory, errors):
        assert warm_ups == 0
        assert errors == "thread_local"
        first = function()
        counts["captured"] += 1
        answers.append(first)

        def replay():
            counts["replayed"] += 1
            now = function()
            for other in answers:
                for value in tensors(other):
                    value.fill_(float("nan"))
            for old, new in zip(tensors(first), tensors(now), strict=True):
                old.copy_(new)

        return replay, first

    if not CUDA:
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "Memory", object)
    return counts


def tensors(answer) -> list[torch.Tensor]:
    return [value.hidden if isinstance(value, LazyLogits) else value for value in answer.values()]


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
        assert counted["replayed"] >= 3  # of 5 evaluations; the first of a kind is eager


def test_a_failed_capture_runs_eagerly_and_says_so(system, monkeypatch, caplog):
    def refuse(function, *_):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:  # as torch.cuda.graph does when it ends
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(graphs, "capture", refuse)
    monkeypatch.setattr(graphs, "Memory", object)
    drawn = draw(system, graphs.GraphedNet(system.net), {})
    assert torch.equal(drawn["text"], draw(system, system.net, {})["text"])
    assert sum("runs eagerly: operation not permitted" in r.message for r in caplog.records) >= 1
    assert not any("more" in r.message for r in caplog.records)


def test_a_kind_is_captured_when_it_is_asked_again(system, counted):
    """And the oldest kinds are forgotten."""
    net = graphs.GraphedNet(system.net)
    x, t = system.space.prior(Rng.for_batch(0, 4, device=device_of(system))), torch.ones(4, device=device_of(system))
    ask = lambda n: net({m: v[:n] for m, v in x.items()}, dict.fromkeys(x, t[:n]), outputs=["image"])  # noqa: E731
    with torch.no_grad():
        expected = system.net(x, dict.fromkeys(x, t), outputs=["image"])["image"]
        for times in range(3):
            torch.testing.assert_close(ask(4)["image"], expected)
            assert CUDA or counted == {"captured": min(times, 1), "replayed": times}
        for _ in range(2):
            torch.testing.assert_close(ask(2)["image"], expected[:2])
    assert len(net.graphs) == 2
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(graphs, "MOST", 2)
        ask(1)
    assert len(net.graphs) == 2
    assert [len(g.held["x"]["text"]) for g in net.graphs.values()] == [2, 1]


def test_moved_weights_get_new_graphs(system):
    first = graphs.graphed(system.net)
    with torch.no_grad():
        for p in system.net.parameters():
            p.mul_(0.5)
    assert graphs.graphed(system.net) is first
    system.net.trunk[0].streams["text"].qkv.weight.data = system.net.trunk[0].streams["text"].qkv.weight.data.clone()
    assert graphs.graphed(system.net) is not first


class FakeCuda:
    """What a capture uses of torch.cuda, with the rules that a GPU would enforce."""

    def __init__(self, fails: bool = False):
        self.streams, self.capturing, self.pools, self.fails = ["main"], None, [], fails

    def current_stream(self):
        return SimpleNamespace(name=self.streams[-1], wait_stream=lambda other: None)

    def Stream(self):
        return SimpleNamespace(name="side", wait_stream=lambda other: None)

    def graph_pool_handle(self):
        return (0, len(self.pools))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.streams.append(stream.name)
        self.pools.append((pool, stream.name))
        yield
        if self.fails:
            raise RuntimeError("capture was invalidated")  # and the stream stays what it is
        self.streams.pop()


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_keeps_no_copies_and_leaves_the_stream_as_it_was(monkeypatch, fails):
    fake, seen = FakeCuda(fails), []
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    memory = graphs.Memory()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
                graphs.capture(lambda: seen.append((fake.streams[-1], torch.is_autocast_cache_enabled())), 1, memory)
            assert fake.streams == ["main"]
            assert torch.is_autocast_cache_enabled()
    assert seen == [("side", False)] * 4
    assert fake.pools == [((0, 0), "side")] * 2


def test_compiled_code_is_not_compiled_again_in_a_capture(system, counted):
    """The eager first answer runs as the capture will: with another state of autocast, compiled code starts anew."""
    compiled = []

    def backend(module, example):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    for block in system.net.repeated():
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    net = graphs.GraphedNet(system.net)
    x = system.space.prior(Rng.for_batch(0, 4, device=device_of(system)))
    t = torch.ones(4, device=device_of(system))
    with torch.no_grad(), torch.autocast(device_of(system), torch.bfloat16):
        net(x, dict.fromkeys(x, t), outputs=["image"])
        before = len(compiled)
        assert before > 0
        net(x, dict.fromkeys(x, t), outputs=["image"])
    assert len(compiled) == before
    assert CUDA or counted["captured"] == 1


def device_of(system) -> str:
    return next(system.net.parameters()).device.type


def test_rows_picked_by_number_are_not_graphed():
    x = {"a": torch.zeros(2, 3)}
    inputs = {"x": x, "t": {"a": torch.zeros(2)}, "mask": {}}
    assert graphs.signature(inputs, {"a": torch.tensor([0])}) is None
    assert graphs.signature(inputs, {"a": Places.where(torch.eye(2, 3) > 0)}) is None
    whole, half = graphs.signature(inputs, {"a": None}), graphs.signature(inputs, {"a": slice(0, 1)})
    assert whole != half
