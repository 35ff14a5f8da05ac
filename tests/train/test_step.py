"""The training step: compiled networks have no graph breaks and compile once; precision; fixed order of sums."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from anystate.configs.load import ConfigError, load_config
from anystate.kernels import LazyLogits
from anystate.kernels.backend import use_backend
from anystate.model import compilation as compiling
from anystate.model.cpu_memory import deterministic
from anystate.sample import sample
from anystate.train.data.examples import presence
from anystate.train.step import accumulate_gradients
from anystate.train.trainer import Trainer


def trained(config, folder, steps: int = 3):
    trainer = Trainer(config, folder, "cpu", quiet=True)
    losses = []
    for _ in range(steps):
        losses.append(trainer.update())
        trainer.state.step += 1
    return trainer, losses


@pytest.mark.parametrize("condition", ["joint", "image", "text"])
def test_samples_in_bf16_are_close_to_those_in_fp32(tiny, tmp_path, condition):
    """Images in [−1, 1] differ by less than 0.05, 97% of tokens are equal; states are float32, products bfloat16."""
    trainer, _ = trained(tiny("train.lr=1e-2"), tmp_path, steps=40)
    pipeline, data = trainer.ema_pipeline(), trainer.test_data.first(slice(32))
    conditions = {} if condition == "joint" else {condition: data[condition]}
    seen = set()
    pipeline.net.trunk[0].streams["image"].qkv.register_forward_hook(lambda module, x, out: seen.add(out.dtype))
    drawn = {}
    for precision in ("fp32", "bf16"):
        drawn[precision] = sample(
            pipeline.net,
            pipeline.space,
            conditions,
            n=32,
            steps=10,
            guidance=pipeline.guidance(bool(conditions)),
            precision=precision,
        )
        assert drawn[precision]["image"].dtype == torch.float32
    assert seen == {torch.float32, torch.bfloat16}
    assert (drawn["fp32"]["text"] == drawn["bf16"]["text"]).float().mean() >= 0.97
    difference = (drawn["fp32"]["image"] - drawn["bf16"]["image"]).abs().max()
    assert difference < 0.05
    assert (difference > 0) == (condition != "image")


def test_precision_of_samples_follows_device_and_training(tiny, tmp_path):
    trainer = Trainer(tiny(), tmp_path, "cpu", quiet=True)
    pipeline = trainer.ema_pipeline()
    assert pipeline.precision() == "fp32"
    assert pipeline.precision("bf16") == "bf16"
    with pytest.raises(ValueError, match="--precision must be auto, fp32 or bf16, got 'fp16'"):
        pipeline.precision("fp16")

    class OnGpu:
        narrow = False

        def parameters(self):
            yield SimpleNamespace(device=torch.device("cuda"))

    def on_gpu(*overrides: str) -> str:
        return dataclasses.replace(pipeline, net=OnGpu(), config=tiny(*overrides)).precision()

    assert on_gpu() == on_gpu("train.precision=bf16") == "bf16"
    assert on_gpu("train.precision=fp32") == on_gpu("sample.precision=fp32") == "fp32"
    OnGpu.narrow = True  # as the network of a table
    assert on_gpu() == "fp32"
    with pytest.raises(ConfigError, match=r"sample.precision=bf16 are for network.kind: mmdit"):
        load_config("table/default", ["sample.precision=bf16"])


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["whole", "blocks"])
def test_compiled_network_has_no_graph_breaks_and_compiles_once(tiny, tmp_path, device, monkeypatch):
    """Also block by block as on a GPU: how it is compiled does not depend on the device of the weights."""
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    trainer = Trainer(tiny("network.depth=3"), tmp_path, "cpu", quiet=True)
    eager = trainer.update()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling.compile_net(trainer.state.net, torch.device(device), backend="eager")
    trainer.state.step = 0
    for _ in range(2):
        trainer.update()
        trainer.state.step += 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        trainer.update()
        trainer.state.step += 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert graphs <= (1 if device == "cpu" else 4)  # trunk and single-stream blocks, the first and the later ones
    assert eager.keys() == {"image", "text"}


def test_compile_auto_compiles_long_runs_only(tiny, tmp_path):
    short = Trainer(tiny(), tmp_path / "short", "cpu", quiet=True)
    assert not compiling.should_compile("auto", torch.device("cpu"), short.flops)
    assert compiling.should_compile("auto", torch.device("cpu"), lambda: 1e13)
    assert not compiling.should_compile("never", torch.device("cpu"), lambda: 1e13)
    assert compiling.should_compile("always", torch.device("cpu"), lambda: 0.0)


def test_error_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: "a C++ compiler")
    with pytest.raises(ValueError, match="compile=never"):
        compiling.compile_net(torch.nn.Linear(1, 1), torch.device("cpu"), demanded=True)
    assert not compiling.compile_net(torch.nn.Linear(1, 1), torch.device("cpu"))


def test_training_on_the_cpu_is_deterministic(tiny, tmp_path):
    """Compiled code is deterministic inside a step; the caller's settings are restored."""
    trainer = Trainer(tiny(), tmp_path, "cpu", quiet=True)
    with deterministic(trainer.device):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("weighting", ["elbo", "learned"])
def test_gradients_with_the_kernels_equal_those_of_the_reference(tiny, tmp_path, weighting, monkeypatch):
    """Of a batch in two parts, some of whose samples lack the text or have it as a condition; where the weights of the
    text are known, its gradients are computed in the forward pass."""
    settings = (
        f"modalities.text.loss.weighting={weighting}",
        "modalities.text.loss.scale=0.3",
        "train.gradient_accumulation_steps=2",
        "times.condition_prob={text: 0.3}",
    )
    trainer, _ = trained(tiny(*settings, "train.batch=4", "train.lr=1e-2"), tmp_path, steps=2)
    state, at_once, sums = trainer.state, [], LazyLogits.cross_entropy_sum
    monkeypatch.setattr(LazyLogits, "cross_entropy_sum", lambda *args: at_once.append(1) or sums(*args))
    x0 = state.data.batch(state.seed, state.step, state.rows, state.settings.batch)
    x0[presence("text")] = torch.arange(len(state.rows)) % 3 > 0
    results = []
    for choice in ("reference", "triton"):
        state.optimizer.zero_grad(set_to_none=True)
        with use_backend(choice):
            losses = accumulate_gradients(state, x0)
        results.append((losses, [p.grad.clone() for p in state.parameters]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    assert len(at_once) == (2 if weighting == "elbo" else 0)
    assert any(p.grad.abs().max() > 1e-3 for p in state.net.head["text"].parameters())
