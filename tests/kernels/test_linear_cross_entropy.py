"""Cross-entropy of a linear head: losses and gradients of hidden states, weight and bias."""

import pytest
import torch

from anystate.kernels import linear_cross_entropy, linear_cross_entropy_sum, reference, tiles
from anystate.kernels.backend import use_backend
from anystate.kernels.tiles import trial


@pytest.fixture(autouse=True)
def slices(small_blocks):
    """Several slices of 128 states or rows, in blocks that do not divide the number of states, several programs."""
    small_blocks("linear_cross_entropy", CHUNK_BYTES=1)
    small_blocks("linear_cross_entropy_sum", CHUNK_BYTES=1)
    small_blocks("logit_slices", BLOCK=64, PART=4)


def both(target, z_loss=0.0):
    return (
        lambda *parts: linear_cross_entropy(*unpack(parts), target, z_loss, backend="triton"),
        lambda *parts: reference.linear_cross_entropy(*unpack(parts), target, z_loss),
    )


def slack(dtype):
    """In half precision gradients of logits are rounded before or after they are summed or scaled: other errors of the
    same size."""
    return 1.1 if dtype == torch.float32 else 2.5


def unpack(parts):
    return (*parts, None) if len(parts) == 2 else parts


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "states"), [(9, 20, 300), (1, 8, 128), (5, 3, 1)])
def test_loss_and_gradients(rows, width, states, dtype, z_loss, random, tokens, check_gradients):
    target = tokens(rows, high=states)
    target[1::3] = -1
    parts = [random(rows, width, dtype=dtype), random(states, width, dtype=dtype) * 0.5, random(states, dtype=dtype)]
    check_gradients(*both(target, z_loss), parts, factor=slack(dtype))
    check_gradients(*both(target, z_loss), parts[:2], factor=slack(dtype))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "states"), [(70, 12, 70), (9, 20, 300), (1, 8, 128), (5, 3, 1)])
def test_sum_and_gradients(rows, width, states, dtype, z_loss, random, tokens, check_gradients):
    """The sum, the losses and the gradients, which are those of the sum times an upstream number."""
    target, row_weight = tokens(rows, high=states), random(rows).abs()
    target[1::3], row_weight[2::5] = -1, 0.0
    parts = [random(rows, width, dtype=dtype), random(states, width, dtype=dtype) * 0.5, random(states, dtype=dtype)]
    for inputs in (parts, parts[:2]):
        check_gradients(
            lambda *p: linear_cross_entropy_sum(*unpack(p), target, row_weight, z_loss, backend="triton")[0],
            lambda *p: reference.linear_cross_entropy_sum(*unpack(p), target, row_weight, z_loss)[0],
            inputs,
            factor=slack(dtype),
        )
    _, losses = linear_cross_entropy_sum(*parts, target, row_weight, z_loss, backend="triton")
    assert not losses.requires_grad
    assert torch.equal(losses, linear_cross_entropy(*parts, target, z_loss, backend="triton"))


def test_all_rows_ignored(random, device):
    """If all rows are ignored, loss and gradients are zero."""
    hidden, weight = random(4, 8).requires_grad_(), random(130, 8).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, None, torch.full((4,), -1, device=device), 0.1, backend="triton")
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("summed", [False, True])
def test_no_rows(random, tokens, summed):
    hidden, weight, bias = (x.requires_grad_() for x in (random(0, 8), random(130, 8), random(130)))
    inputs = hidden, weight, bias, tokens(0, high=130)
    if summed:
        total, losses = linear_cross_entropy_sum(*inputs, random(0), backend="triton")
        assert losses.shape == (0,)
    else:
        total = linear_cross_entropy(*inputs, backend="triton").sum()
    total.backward()
    assert total == 0.0
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()
    assert not bias.grad.any()


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


@pytest.mark.parametrize("summed", [False, True])
def test_repeated_runs_agree_bit_for_bit(random, tokens, summed):
    target, row_weight = tokens(70, high=300), random(70)

    def gradients():
        parts = [x.clone().requires_grad_() for x in inputs]
        if summed:
            linear_cross_entropy_sum(*parts, target, row_weight, backend="triton")[0].backward()
        else:
            linear_cross_entropy(*parts, target, backend="triton").square().sum().backward()
        return [part.grad for part in parts]

    inputs = [random(70, 6), random(300, 6), random(300)]
    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("summed", [False, True])
def test_results_do_not_depend_on_the_tiles(random, tokens, summed):
    """Up to the order of sums; the rows of a program need not divide those of the batch."""
    target, row_weight, inputs = tokens(9, high=300), random(9), [random(9, 6), random(300, 6), random(300)]

    def results():
        parts = [x.clone().requires_grad_() for x in inputs]
        if summed:
            total = linear_cross_entropy_sum(*parts, target, row_weight, backend="triton")[0]
        else:
            total = (linear_cross_entropy(*parts, target, backend="triton") * row_weight).sum()
        total.backward()
        return [total, *(part.grad for part in parts)]

    default, key = results(), (64, torch.float32)
    fold = trial("linear_cross_entropy_fold", *key, ROWS=4, BLOCK=32, num_warps=2)
    with fold, trial("linear_cross_entropy_gradient", *key, ROWS=8, BLOCK=32, num_warps=1):
        torch.testing.assert_close(results(), default, rtol=1e-5, atol=1e-5)


def test_the_sum_keeps_no_gradients_where_none_are_needed(random, tokens, module, monkeypatch):
    """Without gradients the sum runs the forward pass alone; those of frozen parts are not computed."""
    requested, summed = [], module("linear_cross_entropy_sum")
    operation = summed._sum
    monkeypatch.setattr(summed, "_sum", lambda *args: requested.append(args[-1]) or operation(*args))
    hidden, weight, target, row_weight = random(4, 8), random(130, 8), tokens(4, high=130), random(4)
    with torch.no_grad():
        total, _ = linear_cross_entropy_sum(hidden.requires_grad_(), weight, None, target, row_weight, backend="triton")
    assert not requested
    kept, losses = linear_cross_entropy_sum(hidden, weight, None, target, row_weight, backend="triton")
    torch.testing.assert_close(kept, total)
    assert requested == [[True, False, False]]
    kept.backward()
    assert hidden.grad.any()
    assert weight.grad is None
    assert not losses.requires_grad


def test_slices_fill_the_device(module):
    """Sizes are multiples of 2,048 where the buffer holds as many; a small rest joins the last slice."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    states, rows = module("linear_cross_entropy"), module("linear_cross_entropy_sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILES", {})
        patch.setattr(states, "CHUNK_BYTES", 2**28)
        patch.setattr(rows, "CHUNK_BYTES", 2**29)
        head = meta(49408, 1024)
        assert [w for _, w in states.slices(meta(30720, 1024), head)] == [4096] * 11 + [4352]
        assert [w for _, w in rows.row_parts(meta(30720, 1024), head)] == [4096] * 7 + [2048]
        assert states.slices(meta(2000, 1024), head) == [(0, 49408)]
        assert states.slices(meta(30720, 64), meta(27, 64)) == [(0, 27)]
        assert states.slices(meta(0, 64), meta(27, 64)) == [(0, 27)]
        assert [w for _, w in states.slices(meta(2**20, 64), meta(1000, 64))] == [128] * 7 + [104]
        assert rows.row_parts(meta(700, 64), meta(27, 64)) == [(0, 700)]
        assert [w for _, w in rows.row_parts(meta(500, 8), meta(2**20, 8))] == [256, 244]


@pytest.mark.parametrize("summed", [False, True])
def test_autocast_matches_the_reference(random, tokens, device, summed):
    target, row_weight = tokens(9, high=300), random(9)
    parts = [random(9, 20, dtype=torch.bfloat16), random(300, 20) * 0.5, random(300)]
    results = []
    for choice in ("triton", "reference"):
        inputs = [part.clone().requires_grad_() for part in parts]
        with torch.autocast(device, torch.bfloat16), use_backend(choice):
            if summed:
                total, loss = linear_cross_entropy_sum(*inputs, target, row_weight)
            else:
                loss = linear_cross_entropy(*inputs, target)
                total = loss.sum()
        total.backward()
        results.append([total, loss] + [part.grad for part in inputs])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    parts = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5, 3), (5,))]
    target = torch.tensor([0, -1, 4, 2])

    assert torch.autograd.gradcheck(lambda *p: reference.linear_cross_entropy(*p, target, 0.1), parts)
