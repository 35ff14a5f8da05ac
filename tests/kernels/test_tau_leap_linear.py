"""τ-leaping from hidden states, token by token against the reference on float32 logits."""

import pytest
import torch

from anystate.kernels import reference, tau_leap_linear

B, L, K, D = 2, 19, 70, 20


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    small_blocks("tau_leap_linear", BLOCK_R=16, BLOCK_V=64, BLOCK_D=32, ROW_PROGRAMS=2)


@pytest.fixture
def state(device, random, tokens):
    x = tokens(B, L, high=K)
    x[:, ::2] = K
    x[1] = K
    rate = torch.tensor([0.9, 0.3], dtype=torch.float64, device=device)
    return random(B, L, D), random(K + 1, D) * 0.5, random(K + 1), x, rate


@pytest.mark.parametrize("guided", [None, 2.5, "rows"])
@pytest.mark.parametrize("mask_logit", [False, True])
@pytest.mark.parametrize("rule", ["tau", "euler", "ancestral", "last"])
def test_matches_the_reference(rule, mask_logit, guided, state, random, keys):
    hidden, weight, bias, x, rate = state
    bias = bias if mask_logit else None
    scale = torch.tensor([0.3, 3.0], device=x.device) if guided == "rows" else guided
    guidance = {} if guided is None else {"uncond": random(B, L, D), "guidance": scale}
    theirs = reference.tau_leap_linear(hidden, weight, bias, x, rate, keys(B), K, rule, mask_logit, **guidance)
    ours = tau_leap_linear(hidden, weight, bias, x, rate, keys(B), K, rule, mask_logit, **guidance, backend="triton")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_from_unrounded_logits(dtype, state, keys):
    hidden, weight, bias, x, rate = state
    half = [value.to(dtype) for value in (hidden, weight, bias)]
    ours = tau_leap_linear(*half, x, rate, keys(B), K, "last", backend="triton")
    exact = reference.tau_leap_linear(*(value.float() for value in half), x, rate, keys(B), K, "last")
    assert torch.equal(ours, exact)


@pytest.mark.parametrize("states", [1, 15, 64, 65, 130])
def test_any_number_of_states(states, state, random, keys):
    """Head blocks that are not full, and columns of the head beyond those of the step."""
    hidden, _, _, x, rate = state
    x, weight, bias = torch.where(x == K, states, x.clamp(max=states - 1)), random(states + 3, D), random(states + 3)
    for mask_logit in (False, True):
        arguments = (hidden, weight, bias, x, rate, keys(B), states, "euler", mask_logit)
        assert torch.equal(tau_leap_linear(*arguments, backend="triton"), reference.tau_leap_linear(*arguments))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("rule", ["tau", "last"])
def test_one_sample_and_one_position(shape, rule, state, random, keys):
    """More listed rows than one round of the programs takes, and one row alone."""
    b, length = shape
    x = torch.full(shape, K, device=state[3].device)
    rate = torch.full((b,), 0.9, device=x.device)
    arguments = (random(b, length, D), state[1], state[2], x, rate, keys(b), K, rule, False)
    assert torch.equal(tau_leap_linear(*arguments, backend="triton"), reference.tau_leap_linear(*arguments))


@pytest.mark.parametrize("width", [16, 32, 33, 70])
def test_widths_of_whole_and_of_cut_blocks(width, state, random, keys):
    x, rate = state[3], state[4]
    arguments = (random(B, L, width), random(K, width) * 0.3, None, x, rate, keys(B), K, "last")
    assert torch.equal(tau_leap_linear(*arguments, backend="triton"), reference.tau_leap_linear(*arguments))


def test_no_row_jumps(state, keys):
    hidden, weight, bias, x, _ = state
    for tokens, rate in ((x.clamp(max=K - 1), 1.0), (x, 0.0)):
        assert torch.equal(tau_leap_linear(hidden, weight, bias, tokens, rate, keys(B), K, backend="triton"), tokens)


def test_non_contiguous_hidden(state, keys):
    hidden, weight, bias, x, rate = state
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    ours = tau_leap_linear(strided, weight.t().contiguous().t(), bias, x, rate, keys(B), K, "last", backend="triton")
    assert torch.equal(ours, reference.tau_leap_linear(hidden, weight, bias, x, rate, keys(B), K, "last"))
