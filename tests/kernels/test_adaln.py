"""adaLN modulation, forward and backward, alone and with its input as a second output."""

import pytest
import torch

from anystate.kernels import adaln_modulate, gated_adaln, reference

SHAPES = [(2, 9, 32), (3, 7, 24), (1, 1, 5)]
DTYPES = ["float32 float32", "bfloat16 bfloat16", "float16 float32", "float32 bfloat16"]  # of x and of the modulation


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    """Tiles of a few rows, several runs per sample."""
    small_blocks("row_tiles", TILE=64, PROGRAMS=6)


@pytest.fixture
def inputs(random):
    def make(shape, dtypes):
        dtype, scale_dtype = (getattr(torch, name) for name in dtypes.split())
        rows = (shape[0], shape[2])
        return [random(*shape, dtype=dtype), random(*rows, dtype=scale_dtype), random(*rows, dtype=scale_dtype)]

    return make


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adaln(shape, dtypes, plus_one, inputs, check_gradients):
    check_gradients(
        lambda *parts: adaln_modulate(*parts, 1e-5, plus_one, backend="triton"),
        lambda *parts: reference.adaln_modulate(*parts, 1e-5, plus_one),
        inputs(shape, dtypes),
    )


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_result_is_rounded_once_to_the_dtype_of_the_next_product(dtypes, out, inputs, check_gradients):
    """The backward pass takes the gradient in that dtype and gives x's gradient in x's dtype."""
    parts = inputs((2, 9, 24), dtypes)
    check_gradients(
        lambda *p: adaln_modulate(*p, out_dtype=out, backend="triton"),
        lambda *p: reference.adaln_modulate(*p, out_dtype=torch.float64 if p[0].dtype == torch.float64 else out),
        parts,
    )
    exact = reference.adaln_modulate(*(part.float() for part in parts))
    assert torch.equal(reference.adaln_modulate(*parts, out_dtype=out), exact.to(out))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_branch_the_gradients_of_both_results_are_added(shape, dtypes, inputs, check_gradients):
    check_gradients(
        lambda x, *parts: gated_adaln(x, None, None, *parts, plus_one=True, backend="triton"),
        lambda x, *parts: reference.gated_adaln(x, None, None, *parts, plus_one=True),
        inputs(shape, dtypes),
        factor=1.1 if dtypes.startswith("float32") else 2.0,  # the reference rounds two gradients, and their sum
    )


def test_one_of_the_two_results_is_enough(inputs):
    x, scale, shift = (part.requires_grad_() for part in inputs((2, 5, 8), "float32 float32"))
    for i in (0, 1):
        found = []
        for backend in ("triton", "reference"):
            out = gated_adaln(x, None, None, scale, shift, backend=backend)[i]
            found.append(torch.autograd.grad(out.square().sum(), x)[0])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [300, 512])
def test_wide_rows_are_tiles_of_their_own(width, inputs, check_gradients):
    check_gradients(
        lambda *parts: adaln_modulate(*parts, backend="triton"),
        reference.adaln_modulate,
        inputs((1, 3, width), "float32 bfloat16"),
    )


def test_slices_need_no_copy_and_transposes_work(random):
    """Scale and shift are slices of one projection; x is a slice of a sequence."""
    sequence, modulation = random(2, 12, 24), random(2, 48)
    scale, shift = modulation.chunk(2, -1)
    for x in (sequence[:, 3:9], sequence[:, ::2], random(2, 24, 6).transpose(1, 2)):
        ours, theirs = adaln_modulate(x, scale, shift, backend="triton"), reference.adaln_modulate(x, scale, shift)
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8)])
def test_empty_inputs(shape, random):
    x, rows = random(*shape).requires_grad_(), random(shape[0], shape[2]).requires_grad_()
    adaln_modulate(x, rows, rows, backend="triton").sum().backward()
    assert x.grad.shape == shape
    assert not rows.grad.any()


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    x, scale, shift = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 4), (2, 4)))
    assert torch.autograd.gradcheck(lambda *p: reference.adaln_modulate(*p, plus_one=True), (x, scale, shift))
