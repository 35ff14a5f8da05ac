"""fp8 training with torchao, emulated on the CPU: converted layers, closeness to bf16, and error messages."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from anystate.configs.load import load_config
from anystate.model import MMDiT, Patches, Tokens, float8
from anystate.model.storage import read_tensors
from anystate.sample.pipeline import Pipeline
from anystate.train.step import backward
from anystate.train.trainer import Trainer

CPU = torch.device("cpu")
MISSING = importlib.util.find_spec("torchao") is None
needs_torchao = pytest.mark.skipif(MISSING, reason="torchao is not installed")
LARGE_LAYERS = ["network.head_dim=32", *(f"modalities.{m}.stream.width=64" for m in ("image", "text"))]


@pytest.fixture
def emulated(monkeypatch):
    """Emulation is on, and the layers of the small test models count as large."""
    monkeypatch.setenv(float8.EMULATE, "1")
    monkeypatch.setattr(float8, "MIN_SIZE", 32)


def official() -> MMDiT:
    """The official network's widths on the meta device, one block each."""
    with torch.device("meta"):
        streams = {
            "image": Patches(channels=4, size=32, patch=2, width=1024, single_stream_depth=1),
            "text": Tokens(length=120, states=49408, width=1024, single_stream_depth=1),
        }
        return MMDiT(streams, 1, 8, 64)


def converted(net) -> list[str]:
    return [name for name, module in net.named_modules() if type(module).__name__ == "Float8Linear"]


@needs_torchao
def test_only_large_layers_of_the_blocks_are_converted(monkeypatch):
    monkeypatch.setenv(float8.EMULATE, "1")
    net = official()
    before = {name: p.shape for name, p in net.named_parameters()}
    names = float8.convert(net, CPU, 16)
    blocks = [
        "trunk.0.streams.image",
        "trunk.0.streams.text",
        "tower.image.0.streams.image",
        "tower.text.0.streams.text",
    ]
    expected = {f"{block}.{layer}" for block in blocks for layer in ("qkv", "ff.0", "ff.2")}  # out: 512·1024/1536 = 341
    assert set(names) == set(converted(net)) == expected
    assert {name: p.shape for name, p in net.named_parameters()} == before
    monkeypatch.setattr(float8, "MIN_SIZE", 300)
    net = official()
    assert set(float8.convert(net, CPU, 16)) == expected | {f"{block}.out" for block in blocks}


def run(config, folder, steps: int = 30, device: str = "cpu") -> tuple[Trainer, torch.Tensor]:
    """A trainer and its losses, (steps, modalities)."""
    trainer, losses = Trainer(config, folder, device, quiet=True), []
    for _ in range(steps):
        losses.append(torch.stack(list(trainer.update().values())))
        trainer.state.step += 1
    return trainer, torch.stack(losses)


@needs_torchao
def test_losses_are_close_and_the_checkpoint_is_the_same(emulated, tiny, tmp_path, monkeypatch):
    settings = [*LARGE_LAYERS, "train.steps=30", "train.lr=3e-3"]
    trainer, ours = run(tiny(*settings, "train.precision=fp8"), tmp_path / "fp8")
    other, theirs = run(tiny(*settings, "train.precision=bf16"), tmp_path / "bf16")
    assert len(converted(trainer.state.net)) == 2 * 4 + 2 * 4  # one joint block, two text blocks: see configs
    assert not converted(trainer.state.ema)
    assert (ours != theirs).any()
    assert theirs[-10:].mean() < 0.9 * theirs[:3].mean()  # the loss decreases
    torch.testing.assert_close(ours[-10:].mean(0), theirs[-10:].mean(0), rtol=0.02, atol=0)
    assert all(torch.isfinite(p).all() for p in trainer.state.parameters)
    one, two = trainer.save(), other.save()
    for name in ("model.safetensors", "ema.safetensors", "train_state/optimizer.safetensors"):
        a, b = (read_tensors(folder / name) for folder in (one, two))
        assert {key: (x.shape, x.dtype) for key, x in a.items()} == {key: (x.shape, x.dtype) for key, x in b.items()}
    monkeypatch.setitem(sys.modules, "torchao", None)  # neither loading nor resuming in bf16 needs torchao
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    assert Pipeline.from_pretrained(tmp_path / "fp8").config.train.precision == "fp8"
    again = Trainer(tiny(*settings, "train.precision=bf16"), tmp_path / "fp8", "cpu", quiet=True)
    assert again.state.step == 30
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'anystate\[fp8\]'"):
        Trainer(tiny(*settings, "train.precision=fp8"), tmp_path / "none", "cpu", quiet=True)


@needs_torchao
def test_gradients_are_close_and_there_is_no_graph_break(emulated, tiny, tmp_path):
    """Each block is compiled with fullgraph."""
    trainers = {
        p: Trainer(tiny(*LARGE_LAYERS, f"train.precision={p}"), tmp_path / p, "cpu", quiet=True)
        for p in ("fp8", "bf16")
    }
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in trainers["fp8"].state.net.repeated():
        block.compile(dynamic=False, fullgraph=True, backend="eager")
    grads = {}
    for precision, trainer in trainers.items():
        with torch.no_grad():  # the heads are initialized to zero, so earlier layers would get no gradient
            for m in trainer.state.net.head.values():
                m.linear.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        x0 = trainer.train_data.batch(0, 0, trainer.state.rows, trainer.config.train.batch)
        backward(trainer.state, x0, trainer.state.rows)
        grads[precision] = torch.cat([p.grad.flatten() for p in trainer.state.parameters if p.grad is not None])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.isfinite(grads["fp8"]).all()
    difference = (grads["fp8"] - grads["bf16"]).norm() / grads["bf16"].norm()
    assert 0 < difference < 0.2


@needs_torchao
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < float8.MIN_CAPABILITY,
    reason="needs a GPU with fp8",
)
def test_losses_are_close_on_a_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(float8, "MIN_SIZE", 32)
    found = {}
    for precision in ("fp8", "bf16"):
        config = tiny(*LARGE_LAYERS, "train.lr=3e-3", "compile=always", f"train.precision={precision}")
        found[precision] = run(config, tmp_path / precision, device="cuda")[1][-10:].mean(0)
    torch.testing.assert_close(found["fp8"], found["bf16"], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("settings", "capability", "message"),
    [
        ([], None, "needs a GPU, not cpu; set train.precision=bf16"),
        ([], (8, 0), "needs compute capability 8.9 (Ada, Hopper or later), not 8.0"),
        (["train.batch=24"], (9, 0), "a multiple of 16 samples per forward pass, got 24"),
        (["train.gradient_accumulation_steps=2"], (9, 0), "a multiple of 16 samples per forward pass, got 8"),
        ([], (9, 0), "none reaches K·N/(K + N) = 512"),
    ],
)
def test_unsuitable_settings(tiny, tmp_path, monkeypatch, settings, capability, message):
    config = tiny("train.precision=fp8", *settings)
    if capability is None:
        with pytest.raises(ValueError) as error:
            Trainer(config, tmp_path, "cpu", quiet=True)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        net = MMDiT(
            {"image": Patches(channels=1, size=8, patch=4, width=16), "text": Tokens(length=12, states=31, width=16)},
            1,
            2,
            8,
        )
        with pytest.raises(ValueError) as error:
            float8.convert(net, torch.device("cuda"), config.train.batch // config.train.gradient_accumulation_steps)
    assert message in str(error.value)


def test_fp8_is_for_the_mmdit():
    message = r"^[^{]*train\.precision=fp8 .* for network\.kind: mmdit, whose layers are wide$"
    with pytest.raises(ValueError, match=message):
        load_config("table/default", ["train.precision=fp8"])
