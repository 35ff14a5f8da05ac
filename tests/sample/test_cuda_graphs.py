"""Evaluations as CUDA graphs. Without a GPU, `capture` is replaced by a rerun that writes into the first result."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from anystate.kernels import LazyLogits, Rng
from anystate.sample import Condition, cuda_graphs, sample
from anystate.sample.pipeline import build_pipeline
from anystate.sample.sampler import Run

CUDA = torch.cuda.is_available()


@pytest.fixture
def pipeline(tiny):
    made = build_pipeline(tiny("modalities.text.attend_pads=false"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    made.net.to("cuda" if CUDA else "cpu").eval()
    return made


@pytest.fixture(autouse=True)
def all_positions(monkeypatch):
    """As on a GPU: the logits of all positions are computed, whether they change or not."""
    monkeypatch.setattr(Run, "positions", lambda self, k, outputs: {})


@pytest.fixture
def counted(monkeypatch):
    """Replaces `capture` by a rerun that writes into the first result's memory; counts captures and replays.

    Graphs share memory: a replay overwrites the results of all other graphs.
    """
    counts, results = {"captured": 0, "replayed": 0}, []

    def capture(function, warm_ups, memory, errors):
        assert warm_ups == 0
        assert errors == "thread_local"
        first = function()
        counts["captured"] += 1
        results.append(first)

        def replay():
            counts["replayed"] += 1
            now = function()
            for other in results:
                for value in tensors(other):
                    value.fill_(float("nan"))
            for old, new in zip(tensors(first), tensors(now), strict=True):
                old.copy_(new)

        return replay, first

    if not CUDA:
        monkeypatch.setattr(cuda_graphs, "capture", capture)
        monkeypatch.setattr(cuda_graphs, "Memory", object)
    return counts


def tensors(result: dict) -> list[torch.Tensor]:
    return [value.hidden if isinstance(value, LazyLogits) else value for value in result.values()]


def draw(pipeline, net, conditions):
    return sample(
        net,
        pipeline.space,
        conditions,
        n=4,
        steps=5,
        guidance=pipeline.guidance(bool(conditions)),
        samplers=pipeline.samplers,
        device="cuda" if CUDA else "cpu",
    )


def random_text() -> torch.Tensor:
    return torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(1))


CONDITIONS = {
    "joint": lambda: {},
    "text": lambda: {"text": random_text()},
    "infilling": lambda: {"text": Condition(random_text(), mask=(torch.arange(12) % 2 == 0).expand(4, 12))},
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_graphs_give_the_same_samples(pipeline, counted, case):
    conditions = CONDITIONS[case]()
    eager = draw(pipeline, pipeline.net, conditions)
    graphed = draw(pipeline, cuda_graphs.GraphedNet(pipeline.net), conditions)
    assert torch.equal(eager["text"], graphed["text"])
    torch.testing.assert_close(eager["image"], graphed["image"])
    if not CUDA:
        assert 1 <= counted["captured"] <= 3
        assert counted["replayed"] >= 3  # of 5 evaluations; the first with a signature is eager


def test_a_failed_capture_runs_eagerly_and_says_so(pipeline, monkeypatch, caplog):
    def refuse(function, *_):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:  # as torch.cuda.graph does when it ends
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    monkeypatch.setattr(cuda_graphs, "Memory", object)
    drawn = draw(pipeline, cuda_graphs.GraphedNet(pipeline.net), {})
    assert torch.equal(drawn["text"], draw(pipeline, pipeline.net, {})["text"])
    assert sum("runs eagerly: operation not permitted" in r.message for r in caplog.records) >= 1
    assert not any("more" in r.message for r in caplog.records)


def test_the_second_call_with_a_signature_is_captured(pipeline, counted):
    """And of too many graphs, the oldest are dropped."""
    net, device = cuda_graphs.GraphedNet(pipeline.net), device_of(pipeline)
    x, t = pipeline.space.prior(Rng.for_batch(0, 4, device=device)), torch.ones(4, device=device)

    def evaluate(n: int) -> torch.Tensor:
        return net({m: v[:n] for m, v in x.items()}, dict.fromkeys(x, t[:n]), outputs=["image"])["image"]

    with torch.no_grad():
        expected = pipeline.net(x, dict.fromkeys(x, t), outputs=["image"])["image"]
        for calls in range(3):
            torch.testing.assert_close(evaluate(4), expected)
            assert CUDA or counted == {"captured": min(calls, 1), "replayed": calls}
        for _ in range(2):
            torch.testing.assert_close(evaluate(2), expected[:2])
    assert len(net.graphs) == 2
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
        evaluate(1)
    assert len(net.graphs) == 2
    assert [len(g.inputs["x"]["text"]) for g in net.graphs.values()] == [2, 1]


def test_moved_weights_get_new_graphs(pipeline):
    first = cuda_graphs.with_cuda_graphs(pipeline.net)
    with torch.no_grad():
        for p in pipeline.net.parameters():
            p.mul_(0.5)
    assert cuda_graphs.with_cuda_graphs(pipeline.net) is first
    pipeline.net.trunk[0].streams["text"].qkv.weight.data = (
        pipeline.net.trunk[0].streams["text"].qkv.weight.data.clone()
    )
    assert cuda_graphs.with_cuda_graphs(pipeline.net) is not first


class FakeCuda:
    """The parts of torch.cuda that `capture` uses, with the rules that a GPU enforces."""

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
            raise RuntimeError("capture was invalidated")  # the capture's stream stays the current one
        self.streams.pop()


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_keeps_no_copies_and_leaves_the_stream_as_it_was(monkeypatch, fails):
    fake, seen = FakeCuda(fails), []
    monkeypatch.setattr(cuda_graphs.torch, "cuda", fake)
    memory = cuda_graphs.Memory()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
                cuda_graphs.capture(
                    lambda: seen.append((fake.streams[-1], torch.is_autocast_cache_enabled())), 1, memory
                )
            assert fake.streams == ["main"]
            assert torch.is_autocast_cache_enabled()
    assert seen == [("side", False)] * 4
    assert fake.pools == [((0, 0), "side")] * 2


def test_compiled_code_is_not_compiled_again_in_a_capture(pipeline, counted):
    """The eager first call runs with the same autocast settings as the capture; others would compile the code again."""
    compiled = []

    def backend(module, example):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    for block in pipeline.net.repeated():
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    net = cuda_graphs.GraphedNet(pipeline.net)
    x = pipeline.space.prior(Rng.for_batch(0, 4, device=device_of(pipeline)))
    t = torch.ones(4, device=device_of(pipeline))
    with torch.no_grad(), torch.autocast(device_of(pipeline), torch.bfloat16):
        net(x, dict.fromkeys(x, t), outputs=["image"])
        before = len(compiled)
        assert before > 0
        net(x, dict.fromkeys(x, t), outputs=["image"])
    assert len(compiled) == before
    assert CUDA or counted["captured"] == 1


def device_of(pipeline) -> str:
    return next(pipeline.net.parameters()).device.type


def test_calls_with_positions_are_not_captured(pipeline, counted):
    """The number of positions differs from call to call; {modality: n} is part of the signature."""
    net, device = cuda_graphs.GraphedNet(pipeline.net), device_of(pipeline)
    x, t = pipeline.space.prior(Rng.for_batch(0, 4, device=device)), torch.ones(4, device=device)
    positions = {"text": torch.tensor([0, 5], device=device)}
    with torch.no_grad():
        for _ in range(3):
            net(x, dict.fromkeys(x, t), outputs=["text"], positions=positions)
    assert not net.graphs
    assert counted["captured"] == 0
    inputs = {"x": {"a": torch.zeros(2, 3)}, "t": {"a": torch.zeros(2)}, "mask": {}}
    assert cuda_graphs.signature(inputs, {"a": None}) == cuda_graphs.signature(inputs, ["a"])
    assert cuda_graphs.signature(inputs, {"a": None}) != cuda_graphs.signature(inputs, {"a": 1})


def test_observed_elements_are_inputs_of_the_graph(counted):
    """Networks with `observes` get them at every replay, on fixed memory like x and t."""

    class Net(torch.nn.Module):
        observes = ("a",)

        def forward(self, x, t, mask=None, outputs=None, observed=None):
            return {"a": torch.where(observed["a"], 0.0, x["a"])}

    net, device = cuda_graphs.GraphedNet(Net()), "cuda" if CUDA else "cpu"
    assert net.observes == ("a",)
    x, t = torch.arange(6.0, device=device).view(2, 3), torch.zeros(2, device=device)
    for k in range(3):
        observed = torch.arange(6, device=device).view(2, 3) % 3 == k
        out = net({"a": x}, {"a": t}, outputs=["a"], observed={"a": observed})["a"]
        torch.testing.assert_close(out, x.masked_fill(observed, 0.0))
    assert len(net.graphs) == 1
    assert CUDA or counted["captured"] == 1
