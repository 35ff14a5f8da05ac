"""The recipes that are measured: how many kinds of inputs their blocks are compiled for on a GPU, and their FLOPs."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch import Tensor

from anystate.bench.speed import train as training
from anystate.bench.speed.systems import Bench, config_of, made_up, shaken
from anystate.configs.load import load_config
from anystate.kernels import reference
from anystate.model import compilation as compiling
from anystate.sample import cuda_graphs, sample
from anystate.sample.pipeline import build_pipeline, sample_flops
from anystate.sample.sampler import Run
from anystate.train.step import backward

CPU = torch.device("cpu")
LIMIT = 8  # of kinds that PyTorch compiles one function for by default, before it fails
SMALL = ["network.depth=2", "network.heads=2", "network.head_dim=8", "modalities.image.stream.width=16"]
SMALL += ["modalities.text.stream.width=16"]
TOWERS = [f"modalities.{m}.stream.{name}" for m in ("image", "text") for name in ("cond=16", "single_stream_depth=2")]
WORDS = [f"modalities.text.tokenizer.{value}" for value in ("states=64", "pad=0", "start=null", "end=null")]
SIZES = {
    "official": [*SMALL, *TOWERS, *WORDS, "modalities.text.length=8", "modalities.image.size=8"],
    "emoji": SMALL,
    "digits": SMALL,
}


class Counted:
    """A backend of torch.compile that runs what it is given as it is, and counts the kinds of inputs."""

    def __init__(self):
        self.kinds, self.operations = 0, set()

    def __call__(self, module, example):
        self.kinds += 1
        self.operations |= {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
        return module.forward


@torch.library.custom_op("anystate_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Stands for an attention of packed sequences; of the right shape alone."""
    return q.clone()


varlen.register_fake(lambda q, *others: torch.empty_like(q))
varlen.register_autograd(lambda ctx, grad: (grad, *[None] * 6))


@pytest.fixture
def operations(monkeypatch):
    """Blocks call the operations that they call on a GPU, with stand-ins for kernels: references and zero gradients."""
    adaln, qk_norm, attention = (
        importlib.import_module(f"anystate.kernels.{name}") for name in ("adaln", "qk_norm", "attention")
    )
    for module in (adaln, qk_norm, attention):
        monkeypatch.setattr(module, "use_triton", lambda *_, **__: True)
    zeros = torch.zeros_like
    launchers = {
        "_adaln": reference.adaln_modulate,
        "_adaln_backward": lambda grad, x, scale, *_: (zeros(x), scale.new_zeros(scale.shape), zeros(scale)),
        "_gate": reference.gated_residual,
        "_gate_backward": lambda grad, branch, gate: (zeros(branch), zeros(gate)),
    }
    for name, function in launchers.items():
        monkeypatch.setattr(getattr(adaln, name), "launch", function)
    monkeypatch.setattr(qk_norm._pack, "launch", lambda x, q, k: reference.qk_norm_pack(x, q, k, q[0].shape[0]))
    monkeypatch.setattr(
        qk_norm._pack_backward,
        "launch",
        lambda gq, gk, gv, x, q, k: [*map(zeros, x), *(gamma.new_zeros(2, *gamma.shape) for gamma in q)],
    )
    monkeypatch.setitem(attention.FUNCTIONS, "varlen", functools.partial(attention.varlen_attention, varlen))
    monkeypatch.setattr(attention, "candidates", lambda *kind: ("varlen",) if kind[-1] else ("sdpa",))


@pytest.fixture
def compiled(monkeypatch, operations):
    """compiled(net, dynamic) → how often the compiler is called for a network compiled as on a GPU."""
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    monkeypatch.setattr(compiling, "MAX_COMPILATIONS", LIMIT)
    torch._dynamo.reset()

    def compile_net(net, dynamic: bool) -> Counted:
        backend = Counted()
        assert compiling.compile_net(net, torch.device("cuda"), True, dynamic, backend=backend)
        return backend

    yield compile_net
    torch._dynamo.reset()


def draw(system, known, n: int):
    """As on a GPU: bfloat16 products without kept copies, and no row left out."""
    known = {m: x[:n] for m, x in known.items()}
    with cuda_graphs.no_autocast_cache():
        sample(
            system.net,
            system.space,
            known,
            n=n,
            steps=3,
            guidance=system.guidance(bool(known)),
            samplers=system.samplers,
            batch_size=n,
            precision="bf16",
        )


@pytest.mark.parametrize("size", SIZES)
def test_sampling_compiles_few_kinds(size, compiled, monkeypatch):
    """Jointly and from each modality, one sample and several, in one process, stay below PyTorch's own limit."""
    monkeypatch.setattr(Run, "positions", lambda self, k, outputs: {})
    config = config_of(size, SIZES[size])
    system, pairs = shaken(build_pipeline(config, codecs=False)), made_up(config, CPU)
    system.net.eval().requires_grad_(False)
    data = dict(zip(pairs.names, (pairs.images, pairs.captions[:, 0]), strict=True))
    counted = compiled(system.net, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for n in (4, 1, 3):
            for known in ({}, *({m: x} for m, x in data.items())):
                draw(system, known, n)
            if n == 4:
                assert counted.kinds <= 3  # the trunk, and each modality's tower
    assert counted.kinds <= 6
    assert {f"anystate.{name}.default" for name in ("adaln_modulate", "gated_residual", "qk_norm_pack")} <= {
        *counted.operations
    }


@pytest.mark.parametrize("stage", ["official", "emoji", "digits", "text_image/stage1"])
def test_training_compiles_few_kinds(stage, compiled):
    """The trunk, and each modality's tower; or, where captions have no head, the trunk's last block and one tower."""
    settings = ["train.batch=8", "compile=never", "train.precision=fp32"]
    if stage in SIZES:
        config = config_of(stage, [*SIZES[stage], *settings])
    else:
        config = load_config(
            stage, [*(s for s in SIZES["official"] if "text.stream.single_stream_depth" not in s), *settings]
        )
    trainer = Bench(config, CPU)
    counted = compiled(trainer.state.net, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for _ in range(3):
            trainer.update()
            trainer.state.step += 1
    assert counted.kinds <= 3


def test_a_stream_without_a_head_gets_no_gradients_from_whole_blocks(tiny, compiled):
    """Nor zeros, which weight decay would act on: as where blocks leave it out themselves."""
    trainer = Bench(config_of("digits", [*SMALL, "modalities.text.stream.output=false", "compile=never"]), CPU)
    x0 = trainer.train_data.batch(0, 0, trainer.state.rows, trainer.config.train.batch)
    without = {}
    for whole in (False, True):
        trainer.state.net.whole_blocks = whole
        trainer.state.optimizer.zero_grad(set_to_none=True)
        backward(trainer.state, x0, trainer.state.rows)
        without[whole] = {name for name, p in trainer.state.net.named_parameters() if p.grad is None}
    assert without[True] == without[False]
    assert "trunk.1.streams.text.out.weight" in without[True]
    assert "trunk.0.streams.text.out.weight" not in without[True]


def test_a_batch_tried_in_more_parts_is_compiled_anew(compiled):
    """1, 2 and 4 parts, in one process, with three kinds each."""
    tried, kinds = [], []

    class Small(Bench):
        def update(self):
            losses = super().update()
            tried.append(self.config.train.gradient_accumulation_steps)
            kinds.append(self.counted.kinds)
            if len(tried) < 3:
                raise torch.OutOfMemoryError
            return losses

    def make(device, settings, size):
        config = config_of(size, [*SIZES[size], *settings, "compile=never", "train.precision=fp32", "train.batch=16"])
        made = Small(config, device)
        made.counted = compiled(made.state.net, dynamic=False)
        return made

    functions, _ = training.calls(make, CPU, "fast", ("official", []), None, 1)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        assert functions["start"]()["parts"] == 4
    assert tried == [1, 2, 4]
    assert kinds == [3] * 3


def test_flops_of_the_official_network_by_hand():
    """Of one sample, forward: every matrix product and attention, the logits included; 97 TFLOP a step of 256."""
    config = config_of("official", [])
    with torch.device("meta"):
        system = build_pipeline(config, codecs=False)
    system.net.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*system.net.parameters(), *system.net.buffers()):
            value.zero_()
    width, inner, image, text, states = 1024, 8 * 64, 256, 120, 49409
    positions = {"image": image, "text": text}

    def block(keys: int, *streams: str) -> int:
        """qkv, attention (two products over all keys), out and feed-forward of each stream, and its modulation."""
        linear = 3 * width * inner + inner * width + 2 * 4 * width * width
        return sum(2 * positions[m] * (linear + 2 * keys * inner) + 2 * 6 * width * width for m in streams)

    trunk = 8 * block(image + text, "image", "text")
    towers = 6 * block(image, "image") + 6 * block(text, "text")
    times = 2 * 2 * (256 * width + width * width)
    patches = 2 * 2 * image * (2 * 2 * 4) * width  # embedder and head
    heads = 2 * 2 * 2 * width * width + 2 * text * width * states  # modulation of both, logits
    expected = trunk + towers + times + patches + heads
    assert sample_flops(system) == expected
    assert 3 * 256 * expected == pytest.approx(97e12, rel=0.01)
