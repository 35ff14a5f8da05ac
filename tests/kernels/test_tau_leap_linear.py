"""τ-leaping from hidden states, token by token against the reference on float32 logits."""

import pytest
import torch

from anystate.kernels import reference, tau_leap_linear

B, L, K, D = 2, 19, 70, 20


@pytest.fixture(autouse=True)
def blocks(small_blocks):
    small_blocks("tau_leap_linear", BLOCK_R=16, BLOCK_V=128, BLOCK_D=32, ROW_PROGRAMS=2)


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


def test_no_row_jumps(state, keys):
    hidden, weight, bias, x, _ = state
    for tokens, rate in ((x.clamp(max=K - 1), 1.0), (x, 0.0)):
        assert torch.equal(tau_leap_linear(hidden, weight, bias, tokens, rate, keys(B), K, backend="triton"), tokens)


def test_non_contiguous_hidden(state, keys):
    hidden, weight, bias, x, rate = state
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    ours = tau_leap_linear(strided, weight.t().contiguous().t(), bias, x, rate, keys(B), K, "last", backend="triton")
    assert torch.equal(ours, reference.tau_leap_linear(hidden, weight, bias, x, rate, keys(B), K, "last"))
