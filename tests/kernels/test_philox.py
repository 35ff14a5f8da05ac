"""Philox against its published test vectors, and uniforms, normals and exponentials derived from it."""

import math

import pytest
import torch

from anystate.kernels import Draw, Rng, normal, reference, uniform
from anystate.kernels import random as draws
from anystate.kernels.backend import jit, tl
from anystate.kernels.philox import philox

# counter words, key words, result: Random123, tests/kat_vectors, philox4x32 10
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@jit
def block_kernel(p_keys, p_block, p_out):
    """The four words of one block, in order."""
    o = tl.arange(0, 4)
    words = draws.words_block(p_keys, 0, tl.load(p_block) + tl.arange(0, 1), 0)
    tl.store(p_out + o, words.to(tl.int64))


@jit
def log_exponential_kernel(p_words, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, draws.log_exponential(tl.load(p_words + o).to(tl.uint32)))


@pytest.mark.parametrize("name", KNOWN)
def test_reference_reproduces_the_test_vectors(name):
    counter, key, expected = KNOWN[name]
    words = philox(*[torch.tensor(word) for word in counter + key])
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("name", KNOWN)
def test_kernel_reproduces_the_test_vectors(name, device):
    (c0, *counter), key, expected = KNOWN[name]
    keys = torch.tensor([[*key, *counter]], device=device)
    out = torch.empty(4, dtype=torch.int64, device=device)
    block_kernel[(1,)](keys, torch.tensor([c0], device=device), out)
    assert out.tolist() == expected


@pytest.mark.parametrize("n", [1, 6, 1030])
def test_draws_match_the_reference(n, keys):
    k = keys(3)
    for sub in (0, 3):
        assert torch.equal(uniform(k, n, sub, backend="triton"), reference.uniform(k, n, sub))
        exact = reference.normal(k, n, sub)
        assert (normal(k, n, sub, backend="triton") - exact).abs().max() <= 3e-6


def test_empty_draws(keys):
    assert normal(keys(3), 0, backend="triton").shape == (3, 0)
    assert uniform(keys(3)[:0], 4, backend="triton").shape == (0, 4)


def test_exponentials_keep_the_winning_tail(device):
    """log E against float64, from word 0, where E = 2⁻³³, to the largest."""
    words = torch.tensor([0, 1, 2, 255, 2**8, 2**16, 2**24, 2**31, 2**32 - 2**12, 2**32 - 1], device=device)
    u = (words.double() + 0.5) * 2.0**-32
    exact = torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    out = torch.empty(16, device=device)
    log_exponential_kernel[(1,)](torch.nn.functional.pad(words, (0, 6)), out, BLOCK=16)
    for value in (out[:10], reference.words_to_log_exponential(words)):
        assert ((value - exact).abs() <= 4e-7 * exact.abs().clamp(min=1) + 1e-7)[:-2].all()
        # near u = 1 the resolution of float32 is 2⁻²⁵, which changes log E by at most 1e-2
        assert ((value - exact).abs()[-2:] <= 5e-2).all()


def test_normals_are_normal():
    """First four moments of 10⁶ numbers are within five standard errors."""
    x = reference.normal(Rng.for_batch(0, 1000).keys("image", Draw.NOISE), 1000).double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / len(x))


def test_samples_do_not_depend_on_their_batch(keys):
    assert torch.equal(normal(keys(5), 7, backend="triton")[3:], normal(keys(5)[3:], 7, backend="triton"))
