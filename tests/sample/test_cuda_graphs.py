"""Updates as CUDA graphs. Without a GPU, a `Recording` replays the operations of an update on the memory they had."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from anystate.bench.speed.launches import LaunchCounter, recorded_graphs, update_launches
from anystate.diffusion import Gaussian, Guidance, Linear, LogLinear, LogSNR, Masked, Space
from anystate.model.table_dit import Categorical, Numerical, TableDiT
from anystate.sample import Condition, Sampler, cuda_graphs, sample
from anystate.sample.cuda_graphs import graphs_of
from anystate.sample.pipeline import build_pipeline
from anystate.sample.run import Run

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEPS = 6


def randomized(net: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_((0.05 * torch.randn(p.shape, generator=generator)).to(p))
    return net.to(DEVICE).eval()


@pytest.fixture
def pipeline(tiny):
    made = build_pipeline(tiny("modalities.text.attend_pads=false"))
    randomized(made.net)
    return made


@pytest.fixture
def table():
    """A network with numerical columns, whose observed cells it takes, and categorical ones."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        groups = {"num": Numerical(3), "cat": Categorical((3, 5))}
        net = TableDiT(groups, 16, 2, 2, ["num", "cat"], observed=True, sinusoids=4)
    space = Space(
        {
            "num": Gaussian((3,), Linear(), 1e-3, time_conditioning="log_snr"),
            "cat": Masked(2, 5, LogLinear(1e-3), 1e-3, mask_logit="kept"),
        }
    )
    return SimpleNamespace(net=randomized(net), space=space)


@pytest.fixture
def captured(monkeypatch):
    """The recordings that take the place of graphs, in the order in which they are made; on a GPU, nothing."""
    monkeypatch.setattr(Run, "positions", lambda self, outputs: {})  # as on a GPU
    made: list = []
    with contextlib.nullcontext() if CUDA else recorded_graphs(made):
        yield made


class Unwatched:
    """The network as a plain function, which is never captured."""

    def __init__(self, net):
        self.net, self.partial_outputs = net, getattr(net, "partial_outputs", False)
        self.observes = getattr(net, "observes", ())

    def __call__(self, *args, **options):
        return self.net(*args, **options)


def text(seed: int = 1, n: int = 4) -> torch.Tensor:
    return torch.randint(0, 20, (n, 12), generator=torch.Generator().manual_seed(seed))


def image(seed: int = 1, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def alternate(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return (torch.arange(x[0].numel()) % 2 == seed % 2).view(x[0].shape).expand(x.shape)


PICTURES = {  # conditions of a seed, options
    "joint": (lambda seed: {}, {"guidance": 2.0}),
    "text": (lambda seed: {"text": text(seed)}, {"guidance": Guidance(3.0, 1.0, (0.2, 0.7))}),
    "noisy image": (lambda seed: {"image": (image(seed), 0.3)}, {"guidance": 1.5}),
    "infilling": (lambda seed: {"text": Condition(text(seed), mask=alternate(text(), seed))}, {"guidance": 2.0}),
    "inpainting": (lambda seed: {"image": Condition(image(seed), mask=alternate(image(), seed))}, {}),
    "from time": (lambda seed: {"image": Condition(image(seed), 0.6, alternate(image(), seed))}, {}),
    "bf16": (lambda seed: {"text": text(seed)}, {"guidance": 2.0, "precision": "bf16"}),
    "euler_sde, first_hitting": (
        lambda seed: {},
        {"samplers": {"image": Sampler("euler_sde"), "text": Sampler("first_hitting")}, "steps": 20},
    ),
    "dpmpp_2m, ancestral": (
        lambda seed: {},
        {"samplers": {"image": Sampler("dpmpp_2m", "logsnr"), "text": Sampler("ancestral")}, "guidance": 2.0},
    ),
    "repeated times": (
        lambda seed: {},
        {"samplers": {m: Sampler(None, torch.tensor([1.0, 1.0, 0.8, 0.8, 0.3, 0.0, 0.0])) for m in ("image", "text")}},
    ),
}


def cells(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    z, tokens = torch.randn(5, 3, generator=generator), torch.randint(0, 3, (5, 2), generator=generator)
    return {"num": Condition(z, mask=alternate(z, seed)), "cat": Condition(tokens, mask=alternate(tokens, seed))}


ALLOWED = torch.ones(2, 5, dtype=torch.bool)
ALLOWED[0, 1] = False
ROWS = {
    "euler_sde, tau_leap": (lambda seed: {}, {"samplers": {"num": Sampler("euler_sde"), "cat": Sampler("tau_leap")}}),
    "observed": (cells, {"samplers": {"num": Sampler("heun"), "cat": Sampler("tau_leap")}}),
    "dpmpp_2m, first_hitting": (
        lambda seed: {"num": cells(seed)["num"]},
        {"samplers": {"num": Sampler("dpmpp_2m"), "cat": Sampler("first_hitting")}},
    ),
    "uniforms, ancestral": (
        lambda seed: {},
        {
            "samplers": {"num": Sampler("euler"), "cat": Sampler("ancestral")},
            "uniforms": {"num": torch.linspace(0.1, 0.9, 15, dtype=torch.float64).view(5, 3)},
            "allowed_states": {"cat": ALLOWED},
        },
    ),
}


def draw(net, space, case, seed: int = 1, **options):
    conditions, own = case
    arguments = {"steps": STEPS, "seed": seed, **own, **options}
    return sample(net, space, conditions(seed), n=5 if "cat" in space else 4, device=DEVICE, **arguments)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[m], b[m]) if not CUDA else torch.allclose(a[m], b[m], atol=1e-3) for m in a)


def launches_between_updates(*arguments) -> tuple[dict, set[int]]:
    """The samples that `draw` returns and, over its updates, the numbers of launches outside replays."""
    counts: list[int] = []
    with LaunchCounter() as counter:
        drawn = draw(*arguments, progress=lambda: counts.append(counter.launches))
    return drawn, {after - before for before, after in itertools.pairwise(counts)}


def check_replays(net, space, case, captured) -> None:
    """Three batches of one signature: in the third, nothing is launched but replays; all are as without graphs."""
    drawn, launches = zip(*(launches_between_updates(net, space, case, seed) for seed in (1, 2, 3)), strict=True)
    assert max(launches[0]) > 0
    assert launches[2] == {0}
    ((_, replays),) = graphs_of(net, space, DEVICE).batches.values()
    assert CUDA or len(captured) == len(replays)
    for seed, x in enumerate(drawn, 1):
        assert same(x, draw(Unwatched(net), space, case, seed)), seed
    assert not same(drawn[1], drawn[2])


@pytest.mark.parametrize("case", PICTURES)
def test_nothing_is_launched_between_updates_of_pictures(pipeline, captured, case):
    check_replays(pipeline.net, pipeline.space, PICTURES[case], captured)


@pytest.mark.parametrize("case", ROWS)
def test_nothing_is_launched_between_updates_of_rows(table, captured, case):
    check_replays(table.net, table.space, ROWS[case], captured)


def test_batches_of_one_sampling_share_graphs(pipeline, captured):
    conditions = {"text": text(n=12)}
    whole = sample(pipeline.net, pipeline.space, conditions, n=12, steps=STEPS, batch_size=4, guidance=2.0)
    net = Unwatched(pipeline.net)
    assert same(whole, sample(net, pipeline.space, conditions, n=12, steps=STEPS, batch_size=4, guidance=2.0))
    ((_, replays),) = graphs_of(pipeline.net, pipeline.space, DEVICE).batches.values()
    assert all(replays.values())


def test_trajectories_are_copies(pipeline, captured):
    for _ in range(3):
        x, states = draw(pipeline.net, pipeline.space, PICTURES["joint"], trajectory=True)
        expected, expected_states = draw(Unwatched(pipeline.net), pipeline.space, PICTURES["joint"], trajectory=True)
        assert len(states) == STEPS + 1
        assert all(same(a, b) for a, b in zip(states, expected_states, strict=True))
        assert same(x, expected)
        assert not torch.equal(states[0]["image"], states[1]["image"])


def test_results_are_not_overwritten_by_the_next_batch(pipeline, captured):
    first = draw(pipeline.net, pipeline.space, PICTURES["joint"], 1)
    kept = {m: x.clone() for m, x in first.items()}
    draw(pipeline.net, pipeline.space, PICTURES["joint"], 2)
    assert same(first, kept)


def test_a_log_snr_curve_does_not_wait_for_the_device(table, captured):
    space = Space(dict(table.space))
    space["num"].schedule = LogSNR(lambda t: 12.0 - 24.0 * t)
    check_replays(table.net, space, ROWS["dpmpp_2m, first_hitting"], captured)


def test_what_is_captured_is_part_of_the_signature(pipeline, captured):
    """Another guidance, method, precision, space or time of a condition gets graphs of its own."""
    graphs = graphs_of(pipeline.net, pipeline.space, DEVICE)
    conditions, options = PICTURES["text"]
    changes = [{}, {"guidance": 2.0}, {"precision": "bf16"}, {"samplers": {"image": Sampler("euler")}}, {"steps": 7}]
    for i, change in enumerate(changes, 1):
        draw(pipeline.net, pipeline.space, (conditions, options | change))
        draw(pipeline.net, pipeline.space, (conditions, options | change))
        assert len(graphs.batches) == i
    draw(pipeline.net, pipeline.space, (lambda seed: {"text": (text(), 0.5)}, options))
    draw(pipeline.net, Space(dict(pipeline.space)), (conditions, options))
    assert len(graphs.batches) == len(changes) + 2


def test_the_oldest_graphs_are_dropped(pipeline, captured, monkeypatch):
    graphs = graphs_of(pipeline.net, pipeline.space, DEVICE)
    draw(pipeline.net, pipeline.space, PICTURES["joint"])
    kinds = len(next(iter(graphs.batches.values()))[1])
    assert kinds >= 2
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2 * kinds)
    for steps in (7, 8, 7, 9):
        draw(pipeline.net, pipeline.space, PICTURES["joint"], steps=steps)
    assert [len(run.kinds) for run, _ in graphs.batches.values()] == [7, 9]


def test_a_failed_capture_runs_eagerly_and_says_so(pipeline, captured, caplog):
    def refuse(function, *_):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:  # as torch.cuda.graph does when it ends
            raise RuntimeError("capture was invalidated")

    with mock.patch.object(cuda_graphs, "capture", refuse):
        for seed in (1, 2):
            drawn = draw(pipeline.net, pipeline.space, PICTURES["joint"], seed)
            assert same(drawn, draw(Unwatched(pipeline.net), pipeline.space, PICTURES["joint"], seed))
    said = [r.message for r in caplog.records if "runs eagerly: operation not permitted" in r.message]
    (run, _) = next(iter(graphs_of(pipeline.net, pipeline.space, DEVICE).batches.values()))
    assert len(said) == len(set(run.kinds))  # once for each kind
    assert not any("more" in line for line in said)


@pytest.mark.skipif(CUDA, reason="the recording of the CPU")
def test_a_recording_refuses_what_waits_for_the_device(pipeline, captured, caplog, monkeypatch):
    """Otherwise the tests above would prove little."""
    original = Run.with_observed
    monkeypatch.setattr(
        Run, "with_observed", lambda self, x, *args: original(self, x, *args) if x["image"].sum() else x
    )
    draw(pipeline.net, pipeline.space, PICTURES["joint"])
    assert any("_local_scalar_dense" in r.message for r in caplog.records)


def test_spaces_and_functions_that_may_depend_on_the_host_have_no_graphs(pipeline, captured):
    class Counting(Space):
        def evaluate(self, *args, **options):
            return super().evaluate(*args, **options)

    assert graphs_of(pipeline.net, Counting(dict(pipeline.space)), DEVICE) is None
    assert graphs_of(Unwatched(pipeline.net), pipeline.space, DEVICE) is None
    assert graphs_of(pipeline.net, pipeline.space, torch.device("meta")) is None


def test_moved_weights_get_new_graphs(pipeline, captured):
    first = graphs_of(pipeline.net, pipeline.space, DEVICE)
    with torch.no_grad():
        for p in pipeline.net.parameters():
            p.mul_(0.5)
    assert graphs_of(pipeline.net, pipeline.space, DEVICE) is first
    weight = pipeline.net.trunk[0].streams["text"].qkv.weight
    weight.data = weight.data.clone()
    assert graphs_of(pipeline.net, pipeline.space, DEVICE) is not first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_changed_weights_are_read_by_the_next_sampling(pipeline, captured, precision):
    for _ in range(3):
        drawn = draw(pipeline.net, pipeline.space, PICTURES["text"], precision=precision)
        assert same(drawn, draw(Unwatched(pipeline.net), pipeline.space, PICTURES["text"], precision=precision))
        with torch.no_grad():
            for p in pipeline.net.parameters():
                p.mul_(0.9)


def test_graphs_do_not_keep_the_network(tiny, captured):
    made = build_pipeline(tiny())
    net = randomized(made.net)
    for _ in range(2):
        draw(net, made.space, PICTURES["joint"], precision="bf16")
    batch = weakref.ref(next(iter(graphs_of(net, made.space, DEVICE).batches.values()))[0])
    captured.clear()
    cuda_graphs.release(net)
    assert batch() is None  # at once, without the garbage collector: the memory is wanted
    draw(net, made.space, PICTURES["joint"])
    alive = weakref.ref(net)
    del made, net
    captured.clear()
    gc.collect()
    assert alive() is None


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_code_is_not_compiled_again_in_a_capture(pipeline, captured, precision):
    """The eager first update runs with the same autocast settings and weights as the capture."""
    compiled, replays = [], []

    def backend(module, example):
        compiled.append(module)
        return module.forward

    def capture(function, *_):  # a recording would switch compiled code off
        replays.append(function)
        return function, None

    torch._dynamo.reset()
    for block in pipeline.net.repeated():
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    with contextlib.nullcontext() if CUDA else mock.patch.object(cuda_graphs, "capture", capture):
        draw(pipeline.net, pipeline.space, PICTURES["text"], precision=precision)
        before = len(compiled)
        assert before > 0
        assert CUDA or replays
        draw(pipeline.net, pipeline.space, PICTURES["text"], 2, precision=precision)
    assert len(compiled) == before
    torch._dynamo.reset()


@pytest.mark.parametrize("conditions", [{}, {"text": text()}], ids=["joint", "text"])
def test_launches_of_an_update_on_a_gpu_are_counted(pipeline, conditions):
    counts = update_launches(pipeline, conditions, 4, STEPS)
    middle = list(counts.values())[1]
    assert middle["anystate::dpmpp_2m"] == 1
    assert middle["anystate::tau_leap_linear"] == (0 if conditions else 5)
    assert all("nonzero" not in name and "_local_scalar_dense" not in name for name in middle)
