"""A gated branch is added to the stream and the sum is modulated, forward and backward."""

import pytest
import torch

from anystate.kernels import adaln_modulate, gated_adaln, gated_residual, reference

SHAPES = [(2, 9, 32), (3, 7, 24), (1, 1, 5), (1, 3, 300)]
DTYPES = [  # of the stream, of branch and modulation, of y
    "float32 float32 float32",
    "float32 bfloat16 bfloat16",
    "bfloat16 bfloat16 bfloat16",
    "float16 float16 float16",
    "bfloat16 float32 float32",
]


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    """Tiles of a few rows, several runs per sample."""
    small_blocks("row_tiles", TILE=64, PROGRAMS=6)


@pytest.fixture
def inputs(random):
    def make(shape, stream=torch.float32, other=torch.float32, with_bias=False):
        vectors = [random(shape[0], shape[2], dtype=other) for _ in range(3)]
        bias = [random(shape[2])] if with_bias else []
        return [random(*shape, dtype=stream), random(*shape, dtype=other), *vectors, *bias]

    return make


def calls(out: torch.dtype, plus_one: bool = False, compiled_forward: bool = False):
    """The operation and its reference, which computes in float64 for float64."""

    def ours(x, branch, gate, scale, shift, bias=None):
        options = 1e-5, plus_one, out, bias, compiled_forward
        return gated_adaln(x, branch, gate, scale, shift, *options, backend="triton")

    def theirs(x, branch, gate, scale, shift, bias=None):
        dtype = x.dtype if x.dtype == torch.float64 else out
        return reference.gated_adaln(x, branch, gate, scale, shift, 1e-5, plus_one, dtype, bias)

    return ours, theirs


@pytest.mark.parametrize("compiled_forward", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_adaln(shape, dtypes, with_bias, compiled_forward, inputs, check_gradients):
    stream, other, out = (getattr(torch, name) for name in dtypes.split())
    factor = 1.1 if stream == torch.float32 else 3.0  # the exact x' is not rounded, so largest errors vary
    check_gradients(*calls(out, with_bias, compiled_forward), inputs(shape, stream, other, with_bias), factor)


def test_it_equals_the_two_operations(inputs):
    x, branch, gate, scale, shift, bias = inputs((2, 9, 24), torch.float32, torch.bfloat16, True)
    total, y = gated_adaln(x, branch, gate, scale, shift, out_dtype=torch.bfloat16, bias=bias, backend="triton")
    assert torch.equal(total, gated_residual(x, branch, gate, bias, backend="triton"))
    assert torch.equal(y, adaln_modulate(total, scale, shift, out_dtype=torch.bfloat16, backend="triton"))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_is_enough(used, inputs):
    parts = [part.requires_grad_() for part in inputs((2, 5, 24), with_bias=True)]
    needed = parts if used else [*parts[:3], parts[5]]
    found = []
    for call in calls(torch.float32):
        found.append(torch.autograd.grad(call(*parts)[used].square().sum(), needed))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_slices_need_no_copy(random):
    """Gate, scale and shift are slices of one projection; stream and branch are slices of sequences."""
    sequence, modulation = random(2, 12, 24), random(2, 72)
    for x in (sequence[:, 3:9], sequence[:, ::2]):
        ours, theirs = (call(x, 2 * x, *modulation.chunk(3, -1)) for call in calls(torch.float32))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sums_do_not_depend_on_chance(inputs):
    """Two backward passes give the same bits."""
    parts, found = [part.requires_grad_() for part in inputs((2, 33, 24), with_bias=True)], []
    for _ in range(2):
        total, y = calls(torch.float32)[0](*parts)
        found.append(torch.autograd.grad((total * y).sum(), parts))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8)])
def test_empty_inputs(shape, inputs):
    parts = [part.requires_grad_() for part in inputs(shape, with_bias=True)]
    sum(out.sum() for out in calls(torch.float32)[0](*parts)).backward()
    assert parts[0].grad.shape == shape
    assert not any(part.grad.any() for part in parts[2:])


@pytest.mark.parametrize(("missing", "message"), [(1, "^gate: must be given with a branch"), (2, "^gate: must be")])
def test_branch_and_gate_belong_together(missing, message, inputs):
    parts = inputs((1, 2, 8))
    parts[missing] = None
    with pytest.raises(ValueError, match=message):
        gated_adaln(*parts)
    with pytest.raises(ValueError, match=r"^bias: must be None without a branch"):
        gated_adaln(parts[0], None, None, *parts[3:], bias=parts[3][0])


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    shapes = (2, 3, 4), (2, 3, 4), (2, 4), (2, 4), (2, 4), (4,)
    parts = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *p: reference.gated_adaln(*p[:5], bias=p[5], plus_one=True), parts)
