"""Losses, gradients and samples of a network, with the kernels and with the references."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anystate.bench.speed.kernel_cases import CASES, operation_of
from anystate.bench.speed.kernel_inputs import SIZES, Inputs
from anystate.bench.speed.kernels import modes
from anystate.diffusion import Gaussian, LogLinear, Masked, ScaledLinear, Space
from anystate.kernels import Rng

pytest.importorskip("einops", reason="einops, which the networks need, is not installed")

from anystate.model import MMDiT, Patches, Tokens, float8
from anystate.sample import sample

PAD = 3


@pytest.fixture
def model(device, small_blocks):
    """A network without the zeros of its initialization, and its space; padding is not attended to."""
    small_blocks("tau_leap_linear", BLOCK_R=16)
    torch.manual_seed(0)
    streams = {
        "image": Patches(channels=2, size=4, patch=2, width=16),
        "text": Tokens(length=5, states=11, width=24, single_stream_depth=1),
    }
    net = MMDiT(streams, depth=2, heads=2, head_dim=8).to(device)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = Masked(5, 11, LogLinear(), pad_id=PAD, attend_pads=False)
    return net, Space({"image": Gaussian((2, 4, 4), ScaledLinear()), "text": text})


@pytest.fixture
def data(random, tokens):
    x = tokens(2, 5, high=11)
    x[0, 3:] = PAD
    return {"image": random(2, 2, 4, 4), "text": x}


def losses_and_gradients(model, data, device, autocast):
    net, space = model
    t = {m: torch.tensor([0.3, 0.8], dtype=torch.float64, device=device) for m in space}
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        losses = space.losses(net, data, t, Rng.for_batch(0, 2, device=device))
    gradients = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), list(net.parameters()))
    return losses, gradients


def test_training_step(model, data, device, monkeypatch):
    results = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("ANYSTATE_BACKEND", choice)
        results.append(losses_and_gradients(model, data, device, autocast=False))
    (ours, our_gradients), (theirs, their_gradients) = results
    for name, loss in theirs.items():
        assert (ours[name] - loss).abs().max() <= 1e-5 * loss.abs().max(), name
    for (name, _), a, b in zip(model[0].named_parameters(), our_gradients, their_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6, name


def test_training_step_under_autocast(model, data, device, monkeypatch):
    """Roundings differ. All in all the kernels are as close to float32 as the references, and closer to those."""
    results = {}
    for choice, autocast in (("reference", False), ("reference", True), ("triton", True)):
        monkeypatch.setenv("ANYSTATE_BACKEND", choice)
        results[choice, autocast] = losses_and_gradients(model, data, device, autocast)
    (_, exact), (losses, theirs), (our_losses, ours) = results.values()
    for name, loss in losses.items():
        assert (our_losses[name] - loss).abs().max() <= 0.05 * loss.abs().max(), name
    assert distance(ours, exact) <= 1.2 * distance(theirs, exact)
    assert distance(ours, theirs) <= 0.7 * distance(theirs, exact)
    for (name, _), a, b in zip(model[0].named_parameters(), ours, theirs, strict=True):
        assert distance([a], [b]) <= 0.2, name


def test_training_step_in_fp8(model, data, device, monkeypatch):
    """What a layer in fp8 multiplies comes from a forward pass in PyTorch; the backward pass is the kernels'."""
    monkeypatch.setenv(float8.EMULATE, "1")
    monkeypatch.setattr(float8, "MIN_SIZE", 0)
    results = {}
    for choice, precision in (("reference", "fp32"), ("reference", "fp8"), ("triton", "fp8")):
        monkeypatch.setenv("ANYSTATE_BACKEND", choice)
        if precision == "fp8" and not results.get(("reference", "fp8")):
            assert {name.split(".streams.")[1] for name in float8.convert(model[0], torch.device(device))} == {
                *(f"image.{layer}" for layer in ("qkv", "out", "ff.0", "ff.2"))
            }
        with Dtypes() as seen:
            results[choice, precision] = losses_and_gradients(model, data, device, precision == "fp8")
    assert {"gated_adaln", "gated_adaln_backward", "bias_gelu_backward"} <= {name for name, _ in seen.seen}
    (_, exact), (losses, theirs), (our_losses, ours) = results.values()
    for name, loss in losses.items():
        assert (our_losses[name] - loss).abs().max() <= 0.1 * loss.abs().max(), name
    assert distance(ours, exact) <= 1.2 * distance(theirs, exact)
    for (name, _), a, b in zip(model[0].named_parameters(), ours, theirs, strict=True):
        assert distance([a], [b]) <= 0.4, name


def distance(a, b):
    """‖a − b‖/‖b‖ of lists of tensors."""
    a, b = (torch.cat([x.flatten() for x in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


class Dtypes(TorchDispatchMode):
    """Collects the dtypes that operations are called with, {(operation, (dtype of each floating tensor, …))}."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "anystate":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            name = str(function).removeprefix("anystate.").removesuffix(".default")
            self.seen.add((name, tuple(x.dtype for x in tensors if x.is_floating_point())))
        return function(*args, **(kwargs or {}))


def test_benchmark_and_verification_use_the_dtypes_of_training(model, data, device, monkeypatch):
    """Under autocast some operations get mixed dtypes. The number of modalities does not matter."""
    monkeypatch.setenv("ANYSTATE_BACKEND", "triton")
    with Dtypes() as training:
        losses_and_gradients(model, data, device, autocast=True)
    with Dtypes() as measured:
        for name, case in CASES.items():
            arguments = case.inputs(Inputs(SIZES["tiny"], device, torch.bfloat16))
            for _, function in modes(name, operation_of(name), arguments):
                function()
    names = {name for name, _ in training.seen}
    assert {"adaln_modulate", "gated_residual_backward", "qk_norm_pack", "linear_cross_entropy"} <= names
    assert {kind for kind in training.seen if not kind[0].startswith("qk_norm")} <= measured.seen


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling(model, data, guidance, device, monkeypatch):
    net, space = model
    results = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("ANYSTATE_BACKEND", choice)
        results.append(sample(net, space, n=2, steps=3, guidance=guidance, device=device))
        conditions = {"image": data["image"]}
        results[-1]["caption"] = sample(net, space, conditions, steps=3, guidance=guidance, device=device)["text"]
    ours, theirs = results
    assert torch.equal(ours["text"], theirs["text"])
    assert torch.equal(ours["caption"], theirs["caption"])
    assert (ours["image"] - theirs["image"]).abs().max() < 1e-3 * theirs["image"].abs().max()
