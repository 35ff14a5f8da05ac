"""τ-leaping token by token against the reference."""

import pytest
import torch

from anystate.kernels import reference, tau_leap, tau_leap_uniform

B, L, K = 2, 7, 70
RATES = (0.9, 0.3)


@pytest.fixture(autouse=True, params=[32, 2048], ids=["parts", "one block"])
def blocks(request, small_blocks):
    """A vocabulary of several blocks, whose rows are listed and divided, with fewer programs than rows; and one that
    fits a block."""
    for name in ("tau_leap", "tau_leap_uniform"):
        small_blocks(name, BLOCK=request.param, ROW_PROGRAMS=2)
    small_blocks("moving_rows", FINISH_BLOCK=8, FINISH_PROGRAMS=2)


@pytest.fixture
def state(device, random, tokens):
    """Logits with extra columns, logits of the unconditional branch, mostly masked tokens, float64 rates."""
    x = tokens(B, L, high=K)
    x[:, ::3] = K
    x[1, 1:5] = K
    return random(B, L, K + 3) * 2, random(B, L, K + 3), x, torch.tensor(RATES, dtype=torch.float64, device=device)


@pytest.mark.parametrize("guided", [None, 2.5, "rows"])
@pytest.mark.parametrize("mask_logit", [False, True])
@pytest.mark.parametrize("rule", ["tau", "euler", "ancestral", "last"])
def test_masked_matches_the_reference(rule, mask_logit, guided, state, keys):
    logits, uncond, x, rate = state
    weight = torch.tensor([0.3, 3.0], device=x.device) if guided == "rows" else guided
    guidance = {} if guided is None else {"uncond": uncond, "guidance": weight}
    theirs = reference.tau_leap(logits, x, rate, keys(B), K, rule, mask_logit, **guidance)
    ours = tau_leap(logits, x, rate, keys(B), K, rule, mask_logit, **guidance, backend="triton")
    assert torch.equal(ours, theirs)
    assert rule != "last" or (ours < K).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, state, keys):
    logits, uncond, x, rate = state
    logits, uncond = logits.to(dtype), uncond.to(dtype)
    ours = tau_leap(logits, x, rate, keys(B), K, "euler", True, uncond, 2.0, backend="triton")
    assert torch.equal(ours, reference.tau_leap(logits, x, rate, keys(B), K, "euler", True, uncond, 2.0))


@pytest.mark.parametrize("states", [1, 2, 31, 32, 33])
def test_any_number_of_states(states, random, keys, device):
    logits = random(B, 3, states)
    x = torch.full((B, 3), states, device=device)
    rate = torch.tensor(RATES, device=device)
    for rule in ("tau", "last"):
        ours = tau_leap(logits, x, rate, keys(B), states, rule, backend="triton")
        assert torch.equal(ours, reference.tau_leap(logits, x, rate, keys(B), states, rule))


def test_non_contiguous_logits(state, keys):
    logits, _, x, rate = state
    strided = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (strided, logits.transpose(0, 1).contiguous().transpose(0, 1), logits[..., :K]):
        ours = tau_leap(values, x, rate, keys(B), K, "euler", backend="triton")
        assert torch.equal(ours, reference.tau_leap(logits, x, rate, keys(B), K, "euler"))


def test_nothing_masked_and_everything_masked(state, keys):
    logits, _, x, rate = state
    clean = x.clamp(max=K - 1)
    assert torch.equal(tau_leap(logits, clean, rate, keys(B), K, "last", backend="triton"), clean)
    masked = torch.full_like(x, K)
    ours = tau_leap(logits, masked, rate, keys(B), K, "tau", backend="triton")
    assert torch.equal(ours, reference.tau_leap(logits, masked, rate, keys(B), K, "tau"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("rule", ["tau", "last"])
def test_one_sample_and_one_position(shape, rule, random, keys, device):
    """As for columns of a table, which are sequences of one position."""
    b, length = shape
    x = torch.full(shape, K, device=device)
    logits, rate = random(b, length, K + 1), torch.full((b,), 0.9, device=device)
    ours = tau_leap(logits, x, rate, keys(b), K, rule, True, backend="triton")
    assert torch.equal(ours, reference.tau_leap(logits, x, rate, keys(b), K, rule, True))
    x, odds = x - 1, torch.full((b,), 5.0, device=device)
    ours = tau_leap_uniform(logits, x, rate / K, odds, keys(b), rule, backend="triton")
    assert torch.equal(ours, reference.tau_leap_uniform(logits, x, rate / K, odds, keys(b), rule))


def test_empty_sequence(random, tokens, keys):
    x = tokens(B, 0, high=K)
    assert tau_leap(random(B, 0, K), x, 0.1, keys(B), K, backend="triton").shape == (B, 0)
    assert tau_leap_uniform(random(B, 0, K), x, 0.1, 1.0, keys(B), backend="triton").shape == (B, 0)


def test_forbidden_states_are_never_drawn(state, keys):
    """States with logit −∞ in the conditional branch stay impossible under guidance."""
    logits, uncond, x, rate = state
    logits[..., 1:], uncond[..., 2:] = -torch.inf, -torch.inf
    for kwargs in ({}, {"uncond": uncond, "guidance": 3.0}):
        ours = tau_leap(logits, x, rate, keys(B), K, "last", **kwargs, backend="triton")
        assert (ours[x == K] == 0).all()
        assert torch.equal(ours, reference.tau_leap(logits, x, rate, keys(B), K, "last", **kwargs))


@pytest.mark.parametrize("rule", ["tau", "euler", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_matches_the_reference(rule, dtype, state, tokens, keys, device):
    logits = state[0][..., :K].to(dtype)
    x, odds = tokens(B, L, high=K), torch.tensor([20.0, 300.0], device=device)
    rate = torch.tensor([0.6, 0.2], dtype=torch.float64, device=device) / K
    ours = tau_leap_uniform(logits, x, rate, odds, keys(B), rule, backend="triton")
    assert torch.equal(ours, reference.tau_leap_uniform(logits, x, rate, odds, keys(B), rule))


@pytest.mark.parametrize("states", [2, 31, 32, 33, 65])
def test_uniform_of_any_number_of_states(states, random, tokens, keys, device):
    logits, x, rate = random(B, 5, states), tokens(B, 5, high=states), torch.tensor(RATES, device=device) / states
    odds = torch.tensor([2.0, 30.0], device=device)
    for rule in ("tau", "euler", "last"):
        ours = tau_leap_uniform(logits, x, rate, odds, keys(B), rule, backend="triton")
        assert torch.equal(ours, reference.tau_leap_uniform(logits, x, rate, odds, keys(B), rule))


def test_uniform_without_a_move(state, tokens, keys):
    x = tokens(B, L, high=K)
    assert torch.equal(tau_leap_uniform(state[0][..., :K], x, 0.0, 1.0, keys(B), backend="triton"), x)


def test_uniform_moves_only_to_other_states(random, tokens, keys, device):
    """With two states and odds 0 every move goes to the other state."""
    x, rate = tokens(2, 15, high=2), torch.full((2,), 1.0, device=device)
    ours = tau_leap_uniform(random(2, 15, 2), x, rate, rate * 0, keys(2), "euler", backend="triton")
    assert torch.equal(ours, 1 - x)
