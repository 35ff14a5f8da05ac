"""Compiles every kernel, as its launcher launches it at official sizes, for GPUs that need not be there.

The launchers run on meta tensors while `recorded` catches their launches, so block sizes and flags are the shipped
ones, written nowhere else. Each distinct launch is compiled for each target; registers, shared memory and spills are
read from the cubin. Needs TRITON_INTERPRET unset.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels import adaln, heun, perturb, qk_norm
from ...kernels import random as draws
from ...kernels.backend import INTERPRETED, triton

# their packages' attributes are the operations of the same name
eps_mse, tau_leap, tau_leap_linear, linear_cross_entropy = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in ("eps_mse", "tau_leap", "tau_leap_linear", "linear_cross_entropy")
)

TARGETS = (80, 90, 100)
TRAINED = (  # dtypes of the residual stream and of modulation and branch, and whether γ = 1 + scale
    (torch.float32, torch.bfloat16, False),  # text and images, under autocast
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, True),  # tables
)
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


class Launch(NamedTuple):
    """One kernel with the argument types, constants and options it is launched with."""

    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict
    options: dict[str, int]


class Row(NamedTuple):
    """One line of the table."""

    op: str
    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def describe(kernel, args: tuple, kwargs: dict) -> Launch:
    """What Triton would specialize this launch on: 1 is a constant, multiples of 16 are known to be such."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + DTYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options)


@contextlib.contextmanager
def recorded():
    """Catches kernel launches instead of running them; yields the growing list."""
    launches, original = [], triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(describe(self, args, kwargs))
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


def cases() -> dict:
    """{op: launches at official sizes}, on meta tensors, in bfloat16 and, where training mixes dtypes, in TRAINED."""

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(n=64, dtype=torch.float64):
        return tensor(n, dtype=dtype)

    def words(*shape):
        return tensor(*shape, dtype=torch.int64)

    batch, length, states, width = 64, 120, 49408, 1024
    x32, x16 = tensor(batch, 4, 32, 32, dtype=torch.float32), tensor(batch, 4, 32, 32)
    keys, tokens, rate = words(batch, 5), words(batch, length), rows()
    logits, hidden, head, bias = (
        tensor(batch, length, states + 1),
        tensor(batch, length, width),
        tensor(states + 1, width),
        tensor(states + 1),
    )
    qkv, gammas = [tensor(256, 256, 1536), tensor(256, 120, 1536)], [tensor(8, 64, dtype=torch.float32)] * 2
    joint = tensor(256, 376, 8, 64)

    def leaps(launch):
        for rule in ("tau", "ancestral"):
            for mask_logit in (False, True):
                launch(rule, mask_logit, None, None)
        launch("tau", False, True, rows())
        launch("tau", True, True, rows())

    def masked(rule, mask_logit, guided, guidance):
        tau_leap.launch_masked(
            logits, tokens, rate, keys, states, rule, mask_logit, logits if guided else None, guidance
        )

    def linear(rule, mask_logit, guided, guidance, h=hidden, w=head, b=bias):
        tau_leap_linear.launch(h, w, b, tokens, rate, keys, states, rule, mask_logit, h if guided else None, guidance)

    def linear_all():
        leaps(linear)
        wide, odd = (
            [x.float() for x in (hidden, head, bias)],
            [hidden[..., :99].contiguous(), head[:, :99].contiguous(), bias],
        )
        for parts in (wide, odd):
            linear("tau", False, None, None, *parts)
            linear("tau", True, True, rows(), *parts)

    def steps():
        for kind in ("predict", "correct", "sde"):
            for uncond, guidance in ((None, None), (x16, rows())):
                heun.launch_step(x32, x32, x16, uncond, guidance, rate, rate, rate, keys, 1.0, kind)

    def uniform():
        for rule in ("tau", "euler", "last"):
            tau_leap.launch_uniform(logits, tokens, rate, rate, keys, rule)

    def dpmpp():
        heun.launch_dpmpp(x32, x16, None, None, None, *[rate] * 4, None)
        heun.launch_dpmpp(x32, x16, x16, rate, x32, *[rate] * 5)

    def cross_entropy():
        h, target, loss = tensor(30720, width), words(30720), rows(30720, torch.float32)
        linear_cross_entropy.launch_forward(h, head, bias, target, 0.0)
        linear_cross_entropy.launch_backward(loss, h, head, bias, target, loss, 1e-4, [True] * 3)

    def blocks():
        """(stream, branch, modulation, plus_one) in the dtypes of training."""
        for stream, other, plus_one in TRAINED:
            modulation = tensor(256, 6 * width, dtype=other).chunk(6, -1)
            yield tensor(256, 256, width, dtype=stream), tensor(256, 256, width, dtype=other), modulation, plus_one

    def modulate():
        for x, _, modulation, plus_one in blocks():
            adaln.launch_adaln(x, modulation[0], modulation[1], 1e-5, plus_one)
            adaln.launch_adaln_backward(x, x, modulation[0], 1e-5, plus_one)

    def residual():
        for x, branch, modulation, _ in blocks():
            adaln.launch_gate(x, branch, modulation[2])
            adaln.launch_gate_backward(x, branch, modulation[2])

    def pack():
        qk_norm.launch_pack(qkv, gammas, gammas)
        qk_norm.launch_pack_backward(joint, joint, joint, qkv, gammas, gammas)

    return {
        "draws": lambda: [draws.launch_draw(keys, 4096, 0, normal) for normal in (False, True)],
        "gaussian_perturb": lambda: perturb.launch_gaussian(x32, rate, rate, keys),
        "mask_perturb": lambda: perturb.launch_token(tokens, rate, keys, states, False),
        "uniform_perturb": lambda: perturb.launch_token(tokens, rate, keys, states, True),
        "eps_mse": lambda: (eps_mse.launch_loss(x16, keys), eps_mse.launch_grad(rows(64, torch.float32), x16, keys)),
        "heun": steps,
        "dpmpp_2m": dpmpp,
        "tau_leap": lambda: leaps(masked),
        "tau_leap_uniform": uniform,
        "tau_leap_linear": linear_all,
        "linear_cross_entropy": cross_entropy,
        "adaln_modulate": modulate,
        "gated_residual": residual,
        "qk_norm_pack": pack,
    }


def build(launch: Launch, capability: int) -> tuple[int, int, int]:
    """(registers, bytes of shared memory, bytes of spills) of one compiled launch."""
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, compiled.metadata.shared, stack + local


def table(ops: list[str] | None = None, targets: tuple[int, ...] = TARGETS) -> list[Row]:
    """One row per kernel and target: the largest of each resource over the flags and dtypes it is launched with."""
    if INTERPRETED:
        raise ValueError("compiling needs TRITON_INTERPRET unset: it turns kernels into Python functions")
    rows = []
    for op, launch_all in cases().items():
        if ops and op not in ops:
            continue
        with recorded() as launches:
            launch_all()
        distinct = {repr(launch): launch for launch in launches}.values()
        for kernel in dict.fromkeys(launch.kernel for launch in distinct):
            for target in targets:
                usage = [build(launch, target) for launch in distinct if launch.kernel is kernel]
                largest = (max(values) for values in zip(*usage, strict=True))
                rows.append(Row(op, kernel.__name__, f"sm_{target}", *largest))
    return rows
