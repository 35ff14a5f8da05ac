"""The table of measured block sizes is read, written and used by the launchers."""

import importlib

import pytest
import torch

from anystate.bench.gpu.trials import trials
from anystate.kernels import (
    adaln_modulate,
    bias_gelu,
    gated_adaln,
    gated_residual,
    linear_cross_entropy,
    qk_norm_pack,
    reference,
    tiles,
)
from anystate.kernels.tiles import key_of, measured, read, trial, write

TRAINED = ("adaln_modulate", "gated_residual", "gated_adaln", "bias_gelu", "qk_norm_pack")
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
        "gated_adaln": (
            lambda *a, **o: torch.cat(gated_adaln(*a, **o), -1),
            lambda *a: torch.cat(reference.gated_adaln(*a), -1),
            (x, random(B, L, D), shift, scale, shift),
        ),
        "bias_gelu": (bias_gelu, reference.bias_gelu, (x, random(D))),
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


SWEPT = {f"{op}{backward}" for op in TRAINED for backward in ("", "_backward")} | {
    *("linear_cross_entropy", "linear_cross_entropy_sum"),
    *("linear_cross_entropy_fold", "linear_cross_entropy_gradient"),
    *("tau_leap", "tau_leap_guided", "tau_leap_uniform", "tau_leap_linear", "tau_leap_linear_guided"),
}
CHOICES = {
    "adaln_modulate": [{"ROWS": 1, "num_warps": 1}, {"ROWS": 4, "num_warps": 4}],
    "adaln_modulate_backward": [{"ROWS": 2, "num_warps": 1, "programs": 3}],
    "gated_residual": [{"ROWS": 1, "num_warps": 2}],
    "gated_residual_backward": [{"ROWS": 1, "num_warps": 1, "programs": 7}],
    "gated_adaln": [{"ROWS": 1, "num_warps": 2}],
    "gated_adaln_backward": [{"ROWS": 2, "num_warps": 1, "programs": 3}],
    "bias_gelu": [{"ROWS": 2, "COLUMNS": 16, "num_warps": 1}],
    "bias_gelu_backward": [{"ROWS": 2, "COLUMNS": 16, "num_warps": 1, "programs": 5}],
    "qk_norm_pack": [{"ROWS": 1, "num_warps": 2}, {"ROWS": 4, "num_warps": 1}],
    "qk_norm_pack_backward": [{"ROWS": 2, "num_warps": 1, "programs": 3}],
    "linear_cross_entropy": [{"chunk_bytes": 1}],
}


@pytest.mark.parametrize(("op", "choice"), [(op, choice) for op, choices in CHOICES.items() for choice in choices])
def test_other_tiles_give_the_same_results(op, choice, inputs, monkeypatch):
    """The launchers look up their entries, and the results do not depend on the tiles."""
    ours, theirs, arguments = inputs[op.removesuffix("_backward")]
    requested = []
    for name in ("row_tiles", "bias_gelu", "qk_norm", "linear_cross_entropy"):
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
    """An entry overrides parts of the default; with guidance there is another entry."""
    tile = importlib.import_module("anystate.kernels.tau_leap_linear").tile
    default, guided = (tile(torch.bfloat16, 1024, branch) for branch in (False, True))
    with trial("tau_leap_linear", 1024, torch.bfloat16, BLOCK_V=128, num_warps=8):
        assert tile(torch.bfloat16, 1024, False) == default | {"BLOCK_V": 128, "num_warps": 8}
        assert tile(torch.bfloat16, 1024, True) == guided
        assert tile(torch.float32, 1024, False)["num_warps"] == default["num_warps"]


class Requests(dict):
    """A table of tiles that remembers what is looked up."""

    def __init__(self):
        super().__init__()
        self.keys_requested = []

    def get(self, key, default=None):
        self.keys_requested.append(key)
        return super().get(key, default)


def test_the_sweep_times_what_the_launchers_look_up(device, monkeypatch, module):
    """Every trial sets the entry that its launch reads, and every entry that is read has a trial."""
    for op in ("tau_leap", "tau_leap_uniform"):
        monkeypatch.setattr(module(op), "BLOCK", 32)  # below the states, on a GPU too: only then a row has parts
    table, swept = Requests(), set()
    monkeypatch.setattr(tiles, "TILES", table)
    for one in trials(device, "tiny"):
        table.keys_requested.clear()
        one.launch()
        assert key_of(one.op, one.width, one.dtype) in table.keys_requested, one.op
        swept |= {one.op}
        assert {op for op, _, _ in table.keys_requested} <= SWEPT, one.op
    assert swept == SWEPT


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
