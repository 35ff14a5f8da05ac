"""Cross-entropy of a linear head: losses and gradients of hidden states, weight and bias."""

import pytest
import torch

from anystate.kernels import linear_cross_entropy, reference


@pytest.fixture(autouse=True)
def slices(small_blocks):
    """Several slices of 128 states, in blocks that do not divide the number of states."""
    small_blocks("linear_cross_entropy", CHUNK_BYTES=1, BLOCK=64)


def both(target, z_loss=0.0):
    return (
        lambda *parts: linear_cross_entropy(*unpack(parts), target, z_loss, backend="triton"),
        lambda *parts: reference.linear_cross_entropy(*unpack(parts), target, z_loss),
    )


def unpack(parts):
    return (*parts, None) if len(parts) == 2 else parts


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "states"), [(9, 20, 300), (1, 8, 128), (5, 3, 1)])
def test_loss_and_gradients(rows, width, states, dtype, z_loss, random, tokens, check_gradients):
    target = tokens(rows, high=states)
    target[1::3] = -1
    parts = [random(rows, width, dtype=dtype), random(states, width, dtype=dtype) * 0.5, random(states, dtype=dtype)]
    check_gradients(*both(target, z_loss), parts)
    check_gradients(*both(target, z_loss), parts[:2])


def test_all_rows_ignored(random, device):
    """If all rows are ignored, loss and gradients are zero."""
    hidden, weight = random(4, 8).requires_grad_(), random(130, 8).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, None, torch.full((4,), -1, device=device), 0.1, backend="triton")
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_rows(random, tokens):
    hidden, weight = random(0, 8).requires_grad_(), random(130, 8).requires_grad_()
    linear_cross_entropy(hidden, weight, None, tokens(0, high=130), backend="triton").sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


def test_large_logits_do_not_overflow(random, tokens):
    hidden, weight, target = random(5, 8) * 100, random(300, 8) * 100, tokens(5, high=300)
    ours = linear_cross_entropy(hidden, weight, None, target, backend="triton")
    theirs = reference.linear_cross_entropy(hidden, weight, None, target)
    assert ours.isfinite().all()
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_non_contiguous_parts(random, tokens, check_gradients):
    target = tokens(6, high=200)
    parts = [random(20, 6).t(), random(210, 20)[5:205], random(400)[::2]]
    check_gradients(*both(target), parts)


def test_frozen_parts_get_no_gradient(random, tokens, module, monkeypatch):
    """Gradients of frozen weights and of hidden states of a frozen trunk are not computed."""
    requested = []
    backward = module("linear_cross_entropy")._backward

    def recording(*args):
        requested.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(module("linear_cross_entropy"), "_backward", recording)
    hidden, weight, target = random(4, 8), random(130, 8), tokens(4, high=130)
    for trainable in (hidden, weight):
        leaf = trainable.clone().requires_grad_()
        parts = (leaf, weight) if trainable is hidden else (hidden, leaf)
        linear_cross_entropy(*parts, None, target, backend="triton").sum().backward()
        assert leaf.grad.any()
    assert requested == [[True, False, False], [False, True, False]]


def test_repeated_runs_agree_bit_for_bit(random, tokens):
    target = tokens(9, high=300)

    def gradients():
        parts = [random_.clone().requires_grad_() for random_ in inputs]
        linear_cross_entropy(*parts, target, backend="triton").square().sum().backward()
        return [part.grad for part in parts]

    inputs = [random(9, 20), random(300, 20), random(300)]
    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_autocast_matches_the_reference(random, tokens, device):
    target = tokens(9, high=300)
    parts = [random(9, 20, dtype=torch.bfloat16), random(300, 20) * 0.5, random(300)]
    results = []
    for op, kwargs in ((linear_cross_entropy, {"backend": "triton"}), (reference.linear_cross_entropy, {})):
        inputs = [part.clone().requires_grad_() for part in parts]
        with torch.autocast(device, torch.bfloat16):
            loss = op(*inputs, target, **kwargs)
        loss.sum().backward()
        results.append([loss] + [part.grad for part in inputs])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    parts = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5, 3), (5,))]
    target = torch.tensor([0, -1, 4, 2])

    assert torch.autograd.gradcheck(lambda *p: reference.linear_cross_entropy(*p, target, 0.1), parts)
