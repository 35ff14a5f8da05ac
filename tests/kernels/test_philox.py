"""Philox against its published test vectors, and uniforms, normals and exponentials derived from it."""

import math

import pytest
import torch

from anystate.kernels import Draw, Rng, normal, reference, uniform
from anystate.kernels import random as draws
from anystate.kernels.backend import jit, tl
from anystate.kernels.philox import MASK32, modality_hash, philox, random_words
from anystate.model.compilation import compiler_missing

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
def exponential_kernel(p_words, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, draws.exponential(tl.load(p_words + o).to(tl.uint32)))


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


@pytest.fixture
def words(device):
    """Word 0, where E = 2⁻³³, to the largest, with both sides of u = ¼, where the kernel changes its formula."""
    quarter = [2**30 - 300, 2**30 - 1, 2**30, 2**30 + 300]
    words = [0, 1, 2, 255, 2**8, 2**16, 2**24, 2**29 + 12345, *quarter, 2**31, 3 * 2**30, 2**32 - 2**12, 2**32 - 1]
    return torch.tensor(words, device=device)


def exact_exponentials(words):
    u = (words.double() + 0.5) * 2.0**-32
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))


def test_exponentials_keep_the_winning_tail(words):
    """E of the kernel against float64: a relative error of a few roundings, and of log₂ near u = ¼."""
    out = torch.empty(len(words), device=words.device)
    exponential_kernel[(1,)](words, out, BLOCK=len(words))
    relative = out * math.log(2) / exact_exponentials(words) - 1
    assert (relative[:8].abs() <= 4e-7).all()
    assert (relative[8:-2].abs() <= 1e-6).all()
    # near u = 1 the resolution of float32 is 2⁻²⁵, which changes log E by at most 5e-2
    assert (relative[-2:].abs() <= 5e-2).all()


def test_logarithms_of_exponentials_keep_the_winning_tail(words):
    exact, value = exact_exponentials(words).log(), reference.words_to_log_exponential(words)
    assert ((value - exact).abs() <= 4e-7 * exact.abs().clamp(min=1) + 1e-7)[:-2].all()
    assert ((value - exact).abs()[-2:] <= 5e-2).all()


def test_normals_are_normal():
    """First four moments of 10⁶ numbers are within five standard errors."""
    x = reference.normal(Rng.for_batch(0, 1000).keys("image", Draw.NOISE), 1000).double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / len(x))


def test_samples_do_not_depend_on_their_batch(keys):
    assert torch.equal(normal(keys(5), 7, backend="triton")[3:], normal(keys(5)[3:], 7, backend="triton"))


def plain_keys(rng: Rng, modality: str, draw: Draw) -> torch.Tensor:
    """The layout of keys, column by column."""
    columns = [rng.seed & MASK32, (rng.seed >> 32) & MASK32, rng.samples, rng.step]
    columns.append(modality_hash(modality) << 8 | int(draw) << 2)
    return torch.stack([torch.as_tensor(column).expand(len(rng.samples)) for column in columns], 1)


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5, -(2**40), 123456789012])
@pytest.mark.parametrize("step", [0, 5, 2**32 - 1, torch.tensor(9)], ids=str)
def test_keys_have_the_layout(seed, step):
    rng = Rng(seed, torch.arange(7) * 1234567, step)
    for one in (rng, rng.at(3), rng.at(torch.tensor(4)), rng.at(1).at(0)):
        for modality, draw in (("image", Draw.STEP), ("text", Draw.CONDITIONED)):
            assert torch.equal(one.keys(modality, draw), plain_keys(one, modality, draw))


@pytest.mark.parametrize("step", [4, torch.tensor(4)], ids=["int", "tensor"])
def test_a_stream_of_keys_is_one_launch(step):
    """Of a generator whose batch has been used before: the first stream of a step adds its column, others nothing."""
    counts, rng = [], Rng(3, torch.arange(6))
    rng.keys("image", Draw.PRIOR)
    for draw in (Draw.STEP, Draw.GUIDANCE, Draw.NOISE):
        rng = rng if counts else rng.at(step)
        with LaunchCounter() as counter:
            rng.keys("image", draw)
        counts.append(counter.launches)
    assert counts == [2, 1, 1]


class LaunchCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that are no views."""

    launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += not function.is_view
        return function(*args, **(kwargs or {}))


def test_keys_in_compiled_code():
    """A generator that is made inside and one from outside, at steps on the device, without a graph break."""

    def draw(samples, step, rng=None):
        inner = Rng(-5, samples, step) if rng is None else rng.at(step)
        return inner.keys("a", Draw.TIME) + inner.at(2 * step).keys("b", Draw.STEP)

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    samples = torch.arange(6)
    for rng in (None, Rng(3, samples)):
        for step in (torch.tensor(4), torch.tensor(7)):
            assert torch.equal(compiled(samples, step, rng), draw(samples, step, rng))


def test_keys_of_fake_tensors_are_not_kept():
    from torch._subclasses import FakeTensorMode

    for _ in range(2):
        with FakeTensorMode():
            assert Rng(1, torch.arange(3), 2).keys("a", Draw.TIME).shape == (3, 5)
    rng = Rng(1, torch.arange(3), 2)
    assert torch.equal(rng.keys("a", Draw.TIME), plain_keys(rng, "a", Draw.TIME))


@pytest.mark.skipif(compiler_missing(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_compiled_words_equal_eager_ones(keys):
    """In C++, where products of signed numbers may not overflow."""
    words = torch.compile(random_words, fullgraph=True)(keys(1).cpu(), 64)
    assert torch.equal(words, random_words(keys(1).cpu(), 64))
