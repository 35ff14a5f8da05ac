"""Weights that are kept in bfloat16 while sampling give the same bits as autocast's casts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from anystate.diffusion import Space
from anystate.kernels import Rng
from anystate.model.layers import TokenHead
from anystate.sample import sample, sampler
from anystate.sample.bf16_weights import Bf16Weights
from anystate.sample.pipeline import build_pipeline


@pytest.fixture
def pipeline(tiny):
    made = build_pipeline(tiny("modalities.text.attend_pads=false"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    made.net.eval()
    return made


def weights_of(net: torch.nn.Module) -> dict[str, tuple[int, torch.dtype]]:
    return {name: (id(p), p.dtype) for name, p in net.named_parameters()}


def evaluation(pipeline, seed: int) -> dict[str, torch.Tensor]:
    space, rng = pipeline.space, Rng.for_batch(seed, 4)
    x = space.perturb(space.prior(rng), dict.fromkeys(space, torch.full((4,), 0.5)), rng)
    t = dict.fromkeys(space, torch.full((4,), 0.5, dtype=torch.float64))
    out = space.evaluate(pipeline.net, x, t)
    return {"image": out["image"], "text": out["text"].values(), "column": out["text"].column(3)}


def test_evaluations_are_those_of_autocast(pipeline):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = evaluation(pipeline, 1)
        with Bf16Weights(pipeline.net).used():
            found = evaluation(pipeline, 1)
    for m, x in expected.items():
        assert found[m].dtype == x.dtype
        assert torch.equal(found[m], x)


@pytest.mark.parametrize("given", [[], ["text"]])
def test_samples_are_those_of_autocast(pipeline, given, monkeypatch):
    text = torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(1))
    conditions = {"text": text} if given else {}

    def draw():
        options = {"n": 4, "steps": 4, "guidance": 2.0, "precision": "bf16"}
        return sample(pipeline.net, pipeline.space, conditions, **options)

    kept = draw()
    monkeypatch.setattr(Bf16Weights, "used", lambda self: contextlib.nullcontext())
    cast = draw()
    assert all(torch.equal(kept[m], cast[m]) for m in kept)


def test_only_linear_layers_change_and_only_for_the_time(pipeline):
    before = weights_of(pipeline.net)
    weights = Bf16Weights(pipeline.net)
    with weights.used():
        changed = {name for name, p in pipeline.net.named_parameters() if p.dtype == torch.bfloat16}
        layers = {name: m for name, m in pipeline.net.named_modules() if type(m) is torch.nn.Linear}
        linear = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_parameters()}
        heads = {f"{name}.linear.bias" for name, m in pipeline.net.named_modules() if isinstance(m, TokenHead)}
        assert heads
        assert changed == linear - heads
    assert weights_of(pipeline.net) == before


def test_weights_are_read_again_at_every_use(pipeline):
    before, weights = weights_of(pipeline.net), Bf16Weights(pipeline.net)
    layer, addresses = pipeline.net.trunk[0].streams["text"].qkv, []
    for factor in (1.0, 0.5):
        layer.weight.data.mul_(factor)  # does not change the version of the parameter
        expected = layer.weight.detach().bfloat16()
        with weights.used():
            assert torch.equal(layer.weight, expected)
            addresses.append(layer.weight.data_ptr())
    assert addresses[0] == addresses[1]  # which graphs read
    assert weights_of(pipeline.net) == before


def test_weights_are_restored_after_errors(pipeline):
    before = weights_of(pipeline.net)
    with pytest.raises(ValueError, match="guidance needs a condition"):
        sample(pipeline.net, Space({"text": pipeline.space["text"]}), guidance=2.0, precision="bf16")
    assert weights_of(pipeline.net) == before


def test_plain_functions_are_left_to_autocast(pipeline):
    options = {"n": 2, "steps": 2, "precision": "bf16"}
    plain = sample(lambda *args, **more: pipeline.net(*args, **more), pipeline.space, **options)
    assert all(torch.equal(x, plain[m]) for m, x in sample(pipeline.net, pipeline.space, **options).items())


def test_a_compiled_network_is_compiled_once(pipeline):
    compiled = []

    def backend(module, example):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    pipeline.net.compile(dynamic=False, fullgraph=True, backend=backend)
    text = torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(1))
    counts = []
    for _ in range(3):
        sample(pipeline.net, pipeline.space, {"text": text}, n=4, steps=3, precision="bf16")
        counts.append(len(compiled))
    assert counts[0] == counts[2] > 0
    torch._dynamo.reset()


def test_graphs_keep_the_weights_that_they_read(pipeline):
    graphs, kept = SimpleNamespace(weights=None), []
    for _ in range(2):
        with sampler.in_bf16(pipeline.net, torch.device("cpu"), graphs):
            kept.append((graphs.weights, pipeline.net.trunk[0].streams["text"].qkv.weight.data_ptr()))
    assert kept[0] == kept[1]
