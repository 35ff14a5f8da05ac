"""The measured recipes: how often their blocks are compiled on a GPU, and their FLOPs."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch import Tensor

from anystate.bench.speed import train as training
from anystate.bench.speed.systems import Synthetic, SyntheticTrainer, config_of, untrained
from anystate.configs.load import load_config
from anystate.kernels import Packing, reference
from anystate.model import compilation as compiling
from anystate.model import layers
from anystate.sample import cuda_graphs, sample
from anystate.sample.pipeline import build_pipeline, sample_flops
from anystate.sample.run import Run
from anystate.train.step import backward

CPU = torch.device("cpu")
LIMIT = 12  # of compilations of one function in these tests: for first and later blocks, one and several samples
SMALL = ["network.depth=2", "network.heads=2", "network.head_dim=8", "modalities.image.stream.width=16"]
SMALL += ["modalities.text.stream.width=16"]
SINGLE_STREAM = [
    f"modalities.{m}.stream.{name}" for m in ("image", "text") for name in ("cond=16", "single_stream_depth=2")
]
TOKENIZER = [f"modalities.text.tokenizer.{value}" for value in ("states=64", "pad=0", "start=null", "end=null")]
SIZES = {
    "official": [*SMALL, *SINGLE_STREAM, *TOKENIZER, "modalities.text.length=8", "modalities.image.size=8"],
    "emoji": SMALL,
    "digits": SMALL,
}
LONG = ("official", "emoji")  # their compilations in sampling take long to count


class CountingBackend:
    """A backend of torch.compile that runs graphs unchanged, and counts compilations and operations."""

    def __init__(self):
        self.compilations, self.operations = 0, set()

    def __call__(self, module, example):
        self.compilations += 1
        self.operations |= {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
        return module.forward


@torch.library.custom_op("anystate_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """A stand-in for attention of packed sequences; only the shape of the result is right."""
    return q.clone()


varlen.register_fake(lambda q, *others: torch.empty_like(q))
varlen.register_autograd(lambda ctx, grad: (grad, *[None] * 6))


@pytest.fixture
def operations(monkeypatch):
    """Blocks call the operations that they call on a GPU, with stand-ins for kernels: references and zero gradients."""
    names = ("adaln", "gated_residual", "gated_adaln", "bias_gelu", "qk_norm", "attention")
    adaln, gated_residual, gated_adaln, bias_gelu, qk_norm, attention = modules = [
        importlib.import_module(f"anystate.kernels.{name}") for name in names
    ]
    for module in (*modules, layers):
        monkeypatch.setattr(module, "use_triton", lambda *_, **__: True)
    zeros = torch.zeros_like

    def moments(x):
        return x.new_zeros(2, *x.shape[:2], dtype=torch.float32)

    def gate_and_normalize(x, branch, gate, bias, scale, shift, *options):
        return *reference.gated_adaln(x, branch, gate, scale, shift, *options, bias), moments(x)

    def sums(n, gate):
        return gate.new_zeros(n, *gate.shape, dtype=torch.float32)

    def of_bias(gate, bias):
        return gate.new_zeros(0 if bias is None else gate.shape[1], dtype=torch.float32)

    launchers = {
        adaln._adaln: lambda x, *others: (reference.adaln_modulate(x, *others), moments(x)),
        adaln._adaln_backward: lambda grad, kept, x, moments, scale, *_: (zeros(x), sums(2, scale)),
        gated_residual._gate: reference.gated_residual,
        gated_residual._gate_backward: lambda grad, x, gate, bias: (zeros(x), sums(1, gate)[0], of_bias(gate, bias)),
        gated_adaln._gated_adaln: gate_and_normalize,
        gated_adaln._gated_adaln_backward: lambda grad, kept, x, moments, branch, gate, bias, *_: (
            *(zeros(x), zeros(branch), sums(3, gate), of_bias(gate, bias)),
        ),
        bias_gelu._gelu: reference.bias_gelu,
        bias_gelu._gelu_backward: lambda grad, x, bias: (zeros(x), zeros(bias, dtype=torch.float32)),
    }
    for operation, function in launchers.items():
        monkeypatch.setattr(operation, "launch", function)

    def pack(qkv, q_gamma, k_gamma, rows, cu_k):
        packing = None if rows is None else Packing(rows, cu_k, cu_k)
        return reference.qk_norm_pack(qkv, q_gamma, k_gamma, len(q_gamma[0]), packing)

    monkeypatch.setattr(qk_norm._pack, "launch", pack)
    monkeypatch.setattr(
        qk_norm._pack_backward,
        "launch",
        lambda gq, gk, gv, x, q, k, *_: [*map(zeros, x), *(gamma.new_zeros(2, *gamma.shape) for gamma in q)],
    )
    monkeypatch.setitem(attention.FUNCTIONS, "varlen", functools.partial(attention.varlen_attention, varlen))
    monkeypatch.setattr(attention, "candidates", lambda *kind: ("varlen",) if kind[-1] else ("sdpa",))


@pytest.fixture
def compiled(monkeypatch, operations):
    """compiled(net, dynamic) compiles a network as on a GPU and returns the CountingBackend."""
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    monkeypatch.setattr(compiling, "MAX_COMPILATIONS", LIMIT)
    torch._dynamo.reset()

    def compile_net(net, dynamic: bool) -> CountingBackend:
        backend = CountingBackend()
        assert compiling.compile_net(net, torch.device("cuda"), True, dynamic, backend=backend)
        return backend

    yield compile_net
    torch._dynamo.reset()


def draw(pipeline, conditions, n: int):
    """Sample as on a GPU: bfloat16 without autocast's cache of weights, and all positions computed."""
    conditions = {m: x[:n] for m, x in conditions.items()}
    with cuda_graphs.no_autocast_cache():
        sample(
            pipeline.net,
            pipeline.space,
            conditions,
            n=n,
            steps=3,
            guidance=pipeline.guidance(bool(conditions)),
            samplers=pipeline.samplers,
            batch_size=n,
            precision="bf16",
        )


@pytest.mark.parametrize("size", ["digits", *(pytest.param(size, marks=pytest.mark.long) for size in LONG)])
def test_number_of_compilations_in_sampling(size, compiled, monkeypatch):
    """Joint and conditional sampling, of one and several samples in one process, stay below the limit."""
    monkeypatch.setattr(Run, "positions", lambda self, outputs: {})
    pipeline = untrained(size, SIZES[size])
    data = Synthetic(pipeline.space, CPU).x
    counted = compiled(pipeline.net, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for n in (4, 1, 3):
            for conditions in ({}, *({m: x} for m, x in data.items())):
                draw(pipeline, conditions, n)
            if n == 4:
                assert counted.compilations <= 6  # the trunk, and each modality's blocks: the first, the later ones
    assert counted.compilations <= 12
    assert {f"anystate.{name}.default" for name in ("adaln_modulate", "gated_adaln", "bias_gelu", "qk_norm_pack")} <= {
        *counted.operations
    }


@pytest.mark.parametrize("stage", ["official", "emoji", "digits", "text_image/stage1"])
def test_number_of_compilations_in_training(stage, compiled):
    """First and later blocks of the trunk and of each modality; without a text head also the last one of the trunk."""
    settings = ["train.batch=8", "compile=never", "train.precision=fp32"]
    if stage in SIZES:
        config = config_of(stage, [*SIZES[stage], *settings])
    else:
        config = load_config(
            stage, [*(s for s in SIZES["official"] if "text.stream.single_stream_depth" not in s), *settings]
        )
    trainer = SyntheticTrainer(config, CPU)
    counted = compiled(trainer.state.net, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        for _ in range(3):
            trainer.update()
            trainer.state.step += 1
    assert counted.compilations <= 6


def test_whole_blocks_give_no_gradients_to_a_stream_without_a_head(tiny, compiled):
    """Gradients are None, as without whole blocks, not zero: weight decay would act on those."""
    trainer = SyntheticTrainer(
        config_of("digits", [*SMALL, "modalities.text.stream.output=false", "compile=never"]), CPU
    )
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


@pytest.mark.long
def test_more_accumulation_steps_start_compilation_anew(compiled):
    """1, 2 and 4 gradient accumulation steps in one process, with six compilations each."""
    tried, compilations = [], []

    class Small(SyntheticTrainer):
        def update(self):
            losses = super().update()
            tried.append(self.config.train.gradient_accumulation_steps)
            compilations.append(self.counted.compilations)
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
    assert compilations == [6] * 3


def test_flops_of_the_official_network_by_hand():
    """FLOPs of one sample, forward: every matrix product and attention, the logits included; 97 TFLOP a step of 256."""
    config = config_of("official", [])
    with torch.device("meta"):
        pipeline = build_pipeline(config)
    pipeline.net.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*pipeline.net.parameters(), *pipeline.net.buffers()):
            value.zero_()
    width, inner, image, text, states = 1024, 8 * 64, 256, 120, 49409
    positions = {"image": image, "text": text}

    def block(keys: int, *streams: str) -> int:
        """qkv, attention (two products over all keys), out and feed-forward of each stream, and its modulation."""
        linear = 3 * width * inner + inner * width + 2 * 4 * width * width
        return sum(2 * positions[m] * (linear + 2 * keys * inner) + 2 * 6 * width * width for m in streams)

    trunk = 8 * block(image + text, "image", "text")
    single_stream = 6 * block(image, "image") + 6 * block(text, "text")
    times = 2 * 2 * (256 * width + width * width)
    patches = 2 * 2 * image * (2 * 2 * 4) * width  # embedder and head
    heads = 2 * 2 * 2 * width * width + 2 * text * width * states  # modulation of both, logits
    expected = trunk + single_stream + times + patches + heads
    assert sample_flops(pipeline) == expected
    assert 3 * 256 * expected == pytest.approx(97e12, rel=0.01)
