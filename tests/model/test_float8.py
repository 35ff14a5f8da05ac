"""fp8 training, emulated on the CPU: scales, products, converted layers, closeness to bf16, and error messages."""

from __future__ import annotations

import pytest
import torch

from anystate.configs.load import load_config
from anystate.model import MMDiT, Patches, Tokens, float8
from anystate.model.storage import read_tensors
from anystate.sample.pipeline import Pipeline
from anystate.train.step import backward
from anystate.train.trainer import Trainer

CPU = torch.device("cpu")
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
    return [name for name, module in net.named_modules() if isinstance(module, float8.Float8Linear)]


def test_only_large_layers_of_the_blocks_are_converted(monkeypatch):
    monkeypatch.setenv(float8.EMULATE, "1")
    net = official()
    before = {name: p.shape for name, p in net.named_parameters()}
    names = float8.convert(net, CPU)
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
    assert set(float8.convert(net, CPU)) == expected | {f"{block}.out" for block in blocks}


def test_scales_are_the_smallest_powers_of_two():
    """A row's largest number is from 224 to 448 after scaling, and the others keep 3 bits of mantissa."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=rng) * 2.0 ** torch.randint(-30, 30, (64, 1), generator=rng)
    values, scale = float8.fp8_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest = values.float().abs().amax(1)
    assert ((largest >= 224) & (largest <= 448)).all()
    normal = x.abs() >= scale * 2.0**-6
    error = ((values.float() * scale - x).abs() / x.abs())[normal]
    assert 2.0**-5 < error.max() <= 2.0**-4
    torch.testing.assert_close(float8.fp8_rows(x.T)[0].float(), float8.fp8_rows(x.T.contiguous())[0].float())
    assert float8.fp8_rows(x.T)[0].is_contiguous()


def test_rows_of_zeros_and_of_numbers_that_are_not_finite():
    x = torch.zeros(4, 16, dtype=torch.bfloat16)
    x[1, 3], x[2, 3], x[3, :2] = float("inf"), float("nan"), torch.tensor([448.0, 1.0])
    values, scale = float8.fp8_rows(x)
    back = values.float() * scale
    assert not back[0].any()
    assert back[1].isnan().any()
    assert back[2].isnan().all()
    assert back[3, :2].tolist() == [448.0, 1.0]
    assert scale[3] == 1.0


def layer_and_input(k: int = 64, n: int = 48) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(k, n)
    torch.nn.init.normal_(layer.weight, generator=rng)
    return layer, torch.randn(3, 11, k, generator=rng), torch.randn(3, 11, n, generator=rng)


def test_products_of_a_layer(emulated):
    """Those of the rounded factors, but for the gradients of weight and bias, which are exact."""
    layer, x, grad = layer_and_input()
    x.requires_grad_()
    y = float8.Float8Linear(layer)(x)
    y.backward(grad)

    def rounded(value):
        values, scale = float8.fp8_rows(value.detach().flatten(0, -2))
        return (values.float() * scale).view(value.shape)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, rounded(x) @ rounded(layer.weight).T + layer.bias, **close)
    torch.testing.assert_close(x.grad, rounded(grad) @ rounded(layer.weight.T).T, **close)
    torch.testing.assert_close(layer.weight.grad, grad.flatten(0, 1).T @ x.detach().flatten(0, 1), **close)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), **close)
    exact = x @ layer.weight.T + layer.bias
    assert 1e-3 < (y - exact).norm() / exact.norm() < 0.06


def test_frozen_weights_and_inputs_get_no_gradient(emulated):
    layer, x, grad = layer_and_input()
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    float8.Float8Linear(layer)(x).backward(grad)
    assert layer.weight.grad is None
    assert x.grad.any()


def test_the_hardware_product_is_the_emulated_one():
    """PyTorch multiplies rows with scales of their own on a CPU too, from 2.13 on."""
    layer, x, _ = layer_and_input()
    factors = [float8.fp8_rows(value.detach().flatten(0, -2)) for value in (x, layer.weight)]
    theirs = float8.scaled_product(*factors, torch.bfloat16, emulate=True)
    try:
        ours = float8.scaled_product(*factors, torch.bfloat16, emulate=False)
    except RuntimeError as error:
        pytest.skip(f"this PyTorch has no such product on a CPU: {error}")
    torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-7)


def run(config, folder, steps: int = 30, device: str = "cpu") -> tuple[Trainer, torch.Tensor]:
    """A trainer and its losses, (steps, modalities)."""
    trainer, losses = Trainer(config, folder, device, quiet=True), []
    for _ in range(steps):
        losses.append(torch.stack(list(trainer.update().values())))
        trainer.state.step += 1
    return trainer, torch.stack(losses)


def test_losses_are_close_and_the_checkpoint_is_the_same(emulated, tiny, tmp_path):
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
    assert Pipeline.from_pretrained(tmp_path / "fp8").config.train.precision == "fp8"
    again = Trainer(tiny(*settings, "train.precision=bf16"), tmp_path / "fp8", "cpu", quiet=True)
    assert again.state.step == 30


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
    ("capability", "message"),
    [
        (None, "needs a GPU, not cpu; set train.precision=bf16"),
        ((8, 0), "needs compute capability 8.9 (Ada, Hopper or later), not 8.0"),
        ((9, 0), "reaches K·N/(K + N) = 512; set train.precision=bf16"),
    ],
)
def test_unsuitable_devices_and_networks(tiny, tmp_path, monkeypatch, capability, message):
    if capability is None:
        with pytest.raises(ValueError) as error:
            Trainer(tiny("train.precision=fp8"), tmp_path, "cpu", quiet=True)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        net = MMDiT(
            {"image": Patches(channels=1, size=8, patch=4, width=16), "text": Tokens(length=12, states=31, width=16)},
            1,
            2,
            8,
        )
        with pytest.raises(ValueError) as error:
            float8.convert(net, torch.device("cuda"))
    assert message in str(error.value)


def test_fp8_is_for_the_mmdit():
    message = r"^[^{]*train\.precision=fp8 .* for network\.kind: mmdit, whose layers are wide$"
    with pytest.raises(ValueError, match=message):
        load_config("table/default", ["train.precision=fp8"])
