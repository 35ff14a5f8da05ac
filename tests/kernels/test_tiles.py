"""The table of measured block sizes is read, written and used by the launchers."""

import importlib

import pytest
import torch

from anystate.kernels import adaln_modulate, gated_residual, linear_cross_entropy, qk_norm_pack, reference, tiles
from anystate.kernels.tiles import key_of, measured, read, trial, write

B, L, D, HEADS, STATES = 2, 5, 24, 3, 70


@pytest.fixture
def inputs(random, device):
    """{operation: (ours, reference, arguments)}."""
    x, scale, shift = random(B, L, D), random(B, D), random(B, D)
    qkv, gamma = random(B, L, 3 * D), random(HEADS, D // HEADS)
    weight, target = random(STATES, D), torch.arange(B * L, device=device)
    heads = HEADS
    return {
        "adaln_modulate": (adaln_modulate, reference.adaln_modulate, (x, scale, shift)),
        "gated_residual": (gated_residual, reference.gated_residual, (x, random(B, L, D), scale)),
        "qk_norm_pack": (
            lambda a, b, **o: torch.cat(qk_norm_pack([a], [b], [b], heads, **o), -1),
            lambda a, b: torch.cat(reference.qk_norm_pack([a], [b], [b], heads), -1),
            (qkv, gamma),
        ),
        "linear_cross_entropy": (
            lambda h, w, **o: linear_cross_entropy(h, w, None, target, **o),
            lambda h, w: reference.linear_cross_entropy(h, w, None, target),
            (x.flatten(0, 1), weight),
        ),
    }


CHOICES = {
    "adaln_modulate": [{"ROWS": 1, "num_warps": 1}, {"ROWS": 4, "num_warps": 4}],
    "adaln_modulate_backward": [{"ROWS": 2, "num_warps": 1, "programs": 3}],
    "gated_residual": [{"ROWS": 1, "num_warps": 2}],
    "gated_residual_backward": [{"ROWS": 1, "num_warps": 1, "programs": 7}],
    "qk_norm_pack": [{"num_warps": 2}],
    "qk_norm_pack_backward": [{"num_warps": 1, "programs": 3}],
    "linear_cross_entropy": [{"chunk_bytes": 1}],
}


@pytest.mark.parametrize(("op", "choice"), [(op, choice) for op, choices in CHOICES.items() for choice in choices])
def test_other_tiles_give_the_same_results(op, choice, inputs, monkeypatch):
    """The launchers look up their entries, and the results do not depend on the tiles."""
    ours, theirs, arguments = inputs[op.removesuffix("_backward")]
    requested = []
    for name in ("adaln", "qk_norm", "linear_cross_entropy"):
        module = importlib.import_module(f"anystate.kernels.{name}")
        monkeypatch.setattr(module, "measured", lambda *key: requested.append(key_of(*key)) or measured(*key))
    with trial(op, D, torch.float32, **choice):
        results = []
        for function in (lambda *a: ours(*a, backend="triton"), theirs):
            leaves = [x.clone().requires_grad_() for x in arguments]
            out = function(*leaves)
            out.square().sum().backward()
            results.append([out, *(x.grad for x in leaves)])
    assert (op, D, "float32") in requested
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_head_tiles_follow_the_table():
    tile = importlib.import_module("anystate.kernels.tau_leap_linear").tile
    assert tile(torch.bfloat16, 1024, False) == {
        "BLOCK_R": 64,
        "BLOCK_V": 128,
        "BLOCK_D": 64,
        "num_warps": 8,
        "num_stages": 3,
    }
    with trial("tau_leap_linear", 1024, torch.bfloat16, BLOCK_V=64, num_warps=4, programs=2):
        assert tile(torch.bfloat16, 1024, False)["BLOCK_V"] == 64
        assert tile(torch.bfloat16, 1024, False)["programs"] == 2
        assert tile(torch.bfloat16, 1024, True)["num_warps"] == 8
        assert tile(torch.float32, 1024, False)["num_warps"] == 8


def test_the_table_is_read_as_written(tmp_path):
    table = {("adaln_modulate", 1024, "float32"): {"ROWS": 1, "num_warps": 4}}
    write(table, tmp_path / "tiles.json")
    assert read(tmp_path / "tiles.json") == table
    assert read() == tiles.TILES


def test_trials_are_restored():
    before = dict(tiles.TILES)
    with trial("adaln_modulate", 1024, torch.float32, ROWS=1):
        with trial("adaln_modulate", 1024, torch.float32, ROWS=2):
            assert measured("adaln_modulate", 1024, torch.float32) == {"ROWS": 2}
        assert measured("adaln_modulate", 1024, torch.float32) == {"ROWS": 1}
    assert before == tiles.TILES
