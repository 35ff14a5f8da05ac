"""The plain engine gives what the fast one gives; compiled networks have no graph breaks and compile once."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from anystate.configs.load import load_config
from anystate.configs.table import TableConfig
from anystate.model import compilation as compiling
from anystate.sample import sample
from anystate.train.trainer import Trainer


def trained(config, folder, steps: int = 3):
    trainer = Trainer(config, folder, "cpu", quiet=True)
    losses = []
    for _ in range(steps):
        losses.append(trainer.update())
        trainer.step += 1
    return trainer, losses


def test_plain_and_fast_training_agree(tiny, tmp_path):
    fast, ours = trained(tiny(), tmp_path / "fast")
    plain, theirs = trained(tiny("engine=plain"), tmp_path / "plain")
    for a, b in zip(ours, theirs, strict=True):
        for m in a:
            torch.testing.assert_close(a[m], b[m], rtol=1e-4, atol=1e-5)
    for a, b in zip(fast.ema.parameters(), plain.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["joint", "image", "text"])
@pytest.mark.parametrize("sampler", ["shipped", "official"])
def test_plain_and_fast_samples_agree(tiny, tmp_path, kind, sampler):
    overrides = ["modalities.image.sampler.method=heun", "modalities.text.sampler.method=tau_leap"]
    trainer, _ = trained(tiny(*(overrides if sampler == "official" else [])), tmp_path, steps=20)
    system, data = trainer.averaged(), trainer.test_data
    given = {"image": {"image": data.images[:8]}, "text": {"text": data.captions[:8, 0]}, "joint": {}}[kind]
    drawn = [
        sample(
            system.net,
            system.space,
            given,
            n=8,
            steps=6,
            guidance=system.guidance(bool(given)),
            samplers=system.samplers,
            engine=engine,
        )
        for engine in ("fast", "plain")
    ]
    assert torch.equal(drawn[0]["text"], drawn[1]["text"])
    torch.testing.assert_close(drawn[0]["image"], drawn[1]["image"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["joint", "image", "text"])
def test_samples_in_bf16_stay_near_those_in_fp32(tiny, tmp_path, kind):
    """Within 0.05 of pictures in [−1, 1] and 97% of tokens; states stay float32, the network's products do not."""
    trainer, _ = trained(tiny("train.lr=1e-2"), tmp_path, steps=40)
    system, data = trainer.averaged(), trainer.test_data
    given = {"image": {"image": data.images[:32]}, "text": {"text": data.captions[:32, 0]}, "joint": {}}[kind]
    seen = set()
    system.net.trunk[0].streams["image"].qkv.register_forward_hook(lambda module, x, out: seen.add(out.dtype))
    drawn = {}
    for precision in ("fp32", "bf16"):
        drawn[precision] = sample(
            system.net, system.space, given, n=32, steps=10, guidance=system.guidance(bool(given)), precision=precision
        )
        assert drawn[precision]["image"].dtype == torch.float32
    assert seen == {torch.float32, torch.bfloat16}
    assert (drawn["fp32"]["text"] == drawn["bf16"]["text"]).float().mean() >= 0.97
    apart = (drawn["fp32"]["image"] - drawn["bf16"]["image"]).abs().max()
    assert apart < 0.05
    assert (apart > 0) == (kind != "image")


def test_precision_of_samples_follows_device_and_training(tiny, tmp_path):
    trainer = Trainer(tiny(), tmp_path, "cpu", quiet=True)
    system = trainer.averaged()
    assert system.precision() == "fp32"
    assert system.precision("bf16") == "bf16"
    with pytest.raises(ValueError, match="--precision must be auto, fp32 or bf16, got 'fp16'"):
        system.precision("fp16")

    class OnGpu:
        def parameters(self):
            yield SimpleNamespace(device=torch.device("cuda"))

    def on_gpu(*overrides: str) -> str:
        return dataclasses.replace(system, net=OnGpu(), config=tiny(*overrides)).precision()

    assert on_gpu() == on_gpu("train.precision=bf16") == "bf16"
    assert on_gpu("train.precision=fp32") == on_gpu("sample.precision=fp32") == "fp32"
    with pytest.raises(ValueError, match="tables are drawn in fp32"):
        load_config("table/default", ["sample.precision=bf16"], TableConfig)


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["whole", "blocks"])
def test_compiled_network_has_no_graph_breaks_and_compiles_once(tiny, tmp_path, device, monkeypatch):
    """Also block by block as on a GPU: how it is compiled does not depend on where the weights lie."""
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: None)
    trainer = Trainer(tiny("network.depth=3"), tmp_path, "cpu", quiet=True)
    eager = trainer.update()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling.compile_net(trainer.net, torch.device(device), backend="eager")
    trainer.step = 0
    for _ in range(2):
        trainer.update()
        trainer.step += 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        trainer.update()
        trainer.step += 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert graphs <= (1 if device == "cpu" else 2)
    assert eager.keys() == {"image", "text"}


def test_auto_compiles_long_runs_only(tiny, tmp_path):
    short = Trainer(tiny(), tmp_path / "short", "cpu", quiet=True)
    assert not compiling.pays("auto", torch.device("cpu"), short.work)
    assert compiling.pays("auto", torch.device("cpu"), lambda: 1e13)
    assert not compiling.pays("never", torch.device("cpu"), lambda: 1e13)
    assert compiling.pays("always", torch.device("cpu"), lambda: 0.0)


def test_demanded_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: "a C++ compiler")
    with pytest.raises(ValueError, match="compile=never"):
        compiling.compile_net(torch.nn.Linear(1, 1), torch.device("cpu"), demanded=True)
    assert not compiling.compile_net(torch.nn.Linear(1, 1), torch.device("cpu"))


def test_training_on_the_cpu_adds_up_in_a_fixed_order(tiny, tmp_path):
    """Around a step compiled code is told to be deterministic; what the caller had set comes back."""
    trainer = Trainer(tiny(), tmp_path, "cpu", quiet=True)
    with trainer.engine.running():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
