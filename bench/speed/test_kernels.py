"""pytest-benchmark of the operations in `kernel_cases`: `pytest bench/speed/test_kernels.py --benchmark-only`."""

import pytest
import torch

from anystate.bench.speed.kernel_cases import CASES, operation_of
from anystate.bench.speed.kernel_inputs import SIZES, Inputs
from anystate.bench.speed.kernels import modes
from anystate.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "official" if DEVICE == "cuda" else "tiny"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("implementation", ["anystate", "eager"])
@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in CASES for m in ("forward", "training") if m == "forward" or CASES[n].gradients]
)
def test_speed(name, mode, implementation, benchmark):
    arguments = CASES[name].inputs(Inputs(SIZES[SIZE], DEVICE, DTYPE))
    operation = operation_of(name) if implementation == "anystate" else operation_of(name, reference)
    function = dict(modes(name, operation, arguments))[mode]

    def run():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {mode}"
    benchmark(run)
