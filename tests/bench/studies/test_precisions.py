"""Training in fp8 beside bf16: a short run, and what is refused."""

import json

import pytest
import torch

from anystate.bench.speed.results import ResultLog
from anystate.bench.studies import precisions
from anystate.bench.studies.precisions import PARTS, check, compare_precisions
from anystate.model import float8

CPU = torch.device("cpu")


def test_losses_of_a_short_run_agree_within_the_tolerance(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.delenv(float8.EMULATE, raising=False)
    monkeypatch.setattr(precisions, "evaluate", lambda trainer: {"quality/text_to_image": 0.5, "held_out/text": 2.0})
    log, steps = ResultLog(CPU, tmp_path / "rows.json", lambda line: None), 60
    overrides = [*tiny_overrides, "train.lr=3e-3"]
    compare_precisions("digits", overrides, steps, ["bf16", "fp8"], tmp_path, log, CPU)
    rows = {(row["name"], row["engine"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["digits: held_out/text", "fp8"]["value"] == 2.0
    for m in ("image", "text"):
        curve = [
            rows[f"digits: training loss of {m}, steps to {i * steps // PARTS}", "fp8"] for i in range(1, PARTS + 1)
        ]
        other = rows[f"digits: training loss of {m}, steps to {steps}", "bf16"]
        assert 0 < abs(curve[-1]["value"] / other["value"] - 1.0) < precisions.TOLERANCE
        assert curve[-1]["value"] < 0.95 * curve[0]["value"]
        assert curve[-1]["layers"] > 0
        assert "layers" not in other
    assert float8.MIN_SIZE == 512


@pytest.mark.parametrize(("off", "agrees"), [(0.015, True), (0.025, False), (-0.025, False)])
def test_losses_that_differ_are_an_error(off, agrees):
    log = ResultLog(CPU, None, lambda line: None)
    log.add("digits: training loss of x, steps to 80", {"bf16": 9.0, "fp8": 1.0}, "")
    log.add("digits: training loss of x, steps to 800", {"bf16": 2.0, "fp8": 2.0 * (1 + off)}, "")
    if agrees:
        check(log, "digits: training loss of", "steps to 800")
        return
    with pytest.raises(ValueError, match=r"loss of x, steps to 800: fp8 differs from bf16 by 2.5%; allowed 2%"):
        check(log, "digits: training loss of", "steps to 800")
