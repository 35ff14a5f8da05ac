"""All kernels compile for three GPU architectures without spilling registers."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
from anystate.bench.speed.compile_only import table
print(json.dumps(table(targets=({target},))))
"""


@pytest.mark.parametrize(
    "target", [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]
)
def test_no_spills(target):
    """In a separate process without TRITON_INTERPRET, which would turn kernels into Python functions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(target=target)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) >= 20
    assert all(row[2] == f"sm_{target}" and 0 < row[3] <= 255 for row in rows)
    spilling = [row for row in rows if row[5]]
    assert not spilling, spilling


SIGNATURES = """
import json
from anystate.bench.speed import compile_only
with compile_only.recorded() as launches:
    for op in ("adaln_modulate", "gated_residual", "gated_adaln"):
        compile_only.CASES[op]()
print(json.dumps([[one.kernel.__name__, one.signature] for one in launches]))
"""


def test_compiled_kernels_have_the_dtypes_of_training():
    """float32 stream with bfloat16 modulation and branch; bfloat16 only; float32 only, as for tables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SIGNATURES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    dtypes = {}
    for kernel, signature in json.loads(run.stdout):
        stream = next(signature[p] for p in ("p_x", "p_sum", "p_grad") if p in signature)
        (other,) = {signature[p] for p in ("p_scale", "p_gate", "p_branch") if p in signature}
        dtypes.setdefault(kernel, set()).add((stream, other))
    assert len(dtypes) == 6
    wanted = {("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32")}
    assert all(found == wanted for found in dtypes.values())


OFFSETS = """
import json, re
from anystate.bench.speed import compile_only
from anystate.kernels.backend import triton
products = []
with compile_only.recorded() as launches:
    for op in ("tau_leap", "tau_leap_uniform", "tau_leap_linear"):
        compile_only.CASES[op]()
for launch in {repr(one): one for one in launches}.values():
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    text = triton.compile(source, target=target, options=launch.options).asm["ttir"]
    fixed = set(re.findall(r"(%\\S+) = arith.constant", text))
    for a, b, kind in re.findall(r"arith.muli (%[^ ,]+), (%[^ ,]+) : (\\S+)", text):
        if "i32" in kind and not {a, b} & fixed:
            products.append((launch.kernel.__name__, a, b))
print(json.dumps(products))
"""


def test_offsets_are_64_bit():
    """Rows times tiles of the head, and rows times their strides, can exceed 2³¹; only Philox may multiply two int32
    variables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", OFFSETS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {kernel for kernel, *_ in json.loads(run.stdout)} <= {"_list_kernel"}
