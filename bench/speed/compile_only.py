"""Compile all kernels for several GPU architectures without a GPU, and report registers, shared memory and spills.

The launchers run on meta tensors of official sizes while `recorded` collects their launches, so that block sizes and
flags are those in use. Each distinct launch is compiled for each target, and its resources are read from the cubin.
TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import adaln, heun, perturb, qk_norm
from ...kernels import random as random_numbers
from ...kernels.backend import INTERPRETED, triton

# imported by path, because attributes of the package with these names are operations
eps_mse, tau_leap, tau_leap_uniform, tau_leap_linear, linear_cross_entropy, linear_cross_entropy_sum = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in (
        *("eps_mse", "tau_leap", "tau_leap_uniform", "tau_leap_linear"),
        *("linear_cross_entropy", "linear_cross_entropy_sum"),
    )
)
bias_gelu, gated_adaln, gated_residual = (
    importlib.import_module(f"...kernels.{name}", __package__)
    for name in ("bias_gelu", "gated_adaln", "gated_residual")
)

TARGETS = (80, 90, 100)
BATCH, LENGTH, STATES, WIDTH = 64, 120, 49408, 1024  # of the official text+image network
BATCH_ROWS = 256 * LENGTH  # positions of a training batch
NARROW = 2000  # states of a vocabulary that fits one block
SM_REGISTERS, SM_WARPS, SM_CTAS, SM_TENSOR_COLUMNS = 65536, 64, 32, 512  # of an SM of these targets
SM_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
TRAINING = (  # dtypes of the residual stream and of modulation and branch, and whether γ = 1 + scale
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
    """A kernel with the argument types, constants and options of one launch."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict
    options: dict[str, int]


class Usage(NamedTuple):
    """One line of the table: resources of a kernel on a target, and how many of its CTAs an SM holds."""

    op: str
    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    warps: int
    ctas_per_sm: int


class Build(NamedTuple):
    """Resources of one compiled launch; those of a CTA but for registers, which are those of a thread."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    warps: int
    tensor_columns: int  # of tensor memory, on sm_100

    def ctas_per_sm(self, capability: int) -> int:
        """How many CTAs an SM holds: the tightest of its limits.

        Registers belong to one of four partitions of the SM and are allotted to a warp in units of 256; a CTA takes
        shared memory in units of 128 B, with 1 KB for the driver. Sources: CUDA C++ Programming Guide, "Technical
        Specifications per Compute Capability"; `cuda_occupancy.h` of CUDA 13, `cudaOccMaxBlocksPerSMRegsLimit`.
        """
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        warps_by_registers = SM_REGISTERS // 4 // registers_of_warp * 4
        shared = -(-self.shared_bytes // 128) * 128 + 1024
        limits = [
            SM_CTAS,
            SM_WARPS // self.warps,
            warps_by_registers // self.warps,
            SM_SHARED_BYTES[capability] // shared,
        ]
        if self.tensor_columns:
            limits.append(SM_TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)


def describe(kernel, args: tuple, kwargs: dict[str, object]) -> Launch:
    """The specialization that Triton chooses for a launch: 1 becomes a constant; divisibility by 16 is recorded."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
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
def recorded() -> Iterator[list[Launch]]:
    """Collect kernel launches in a list instead of running them."""
    launches, original = [], triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(describe(self, args, kwargs))
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


# Inputs on the meta device


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int64(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


def coefficient(n: int = BATCH, dtype: torch.dtype = torch.float64) -> Tensor:
    return meta(n, dtype=dtype)


def latents(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return meta(BATCH, 4, 32, 32, dtype=dtype)


def blocks() -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...], bool]]:
    """(stream, branch, modulation, plus_one) in the dtypes of training."""
    for stream, other, plus_one in TRAINING:
        modulation = meta(256, 6 * WIDTH, dtype=other).chunk(6, -1)
        yield meta(256, 256, WIDTH, dtype=stream), meta(256, 256, WIDTH, dtype=other), modulation, plus_one


def moments(x: Tensor) -> Tensor:
    """Mean and 1/std of every row."""
    return meta(2, *x.shape[:2], dtype=torch.float32)


# Launches of one operation each


def launch_random() -> None:
    for normal in (False, True):
        random_numbers.launch_draw(int64(BATCH, 5), 4096, 0, normal)


def launch_gaussian_perturb() -> None:
    perturb.launch_gaussian(latents(torch.float32), coefficient(), coefficient(), int64(BATCH, 5))


def launch_mask_perturb() -> None:
    perturb.launch_token(int64(BATCH, LENGTH), coefficient(), int64(BATCH, 5), STATES, False)


def launch_uniform_perturb() -> None:
    perturb.launch_token(int64(BATCH, LENGTH), coefficient(), int64(BATCH, 5), STATES, True)


def launch_eps_mse() -> None:
    eps_mse.launch_loss(latents(), int64(BATCH, 5))
    eps_mse.launch_grad(coefficient(dtype=torch.float32), latents(), int64(BATCH, 5))


def launch_heun() -> None:
    x, eps, keys = latents(torch.float32), latents(), int64(BATCH, 5)
    beta = sigma = dt = coefficient()
    for kind in ("predict", "correct", "sde"):
        for uncond, guidance in ((None, None), (eps, coefficient())):
            heun.launch_step(x, x, eps, uncond, guidance, beta, sigma, dt, keys, 1.0, kind)


def launch_dpmpp_2m() -> None:
    x, eps, weight = latents(torch.float32), latents(), coefficient()
    heun.launch_dpmpp(x, eps, None, None, None, weight, weight, weight, weight, None)
    heun.launch_dpmpp(x, eps, eps, weight, x, weight, weight, weight, weight, weight)


def launch_tau_leap() -> None:
    for states in (STATES, NARROW):
        logits = meta(BATCH, LENGTH, states + 1)
        for rule in ("tau", "ancestral"):
            for mask_logit in (False, True):
                tau_leap.launch(logits, **masked_step(rule, mask_logit) | {"states": states}, uncond=None)
        for mask_logit in (False, True):
            step = masked_step("tau", mask_logit, coefficient()) | {"states": states}
            tau_leap.launch(logits, **step, uncond=logits)


def masked_step(rule: str, mask_logit: bool, guidance: Tensor | None = None) -> dict[str, object]:
    return {
        "tokens": int64(BATCH, LENGTH),
        "rate": coefficient(),
        "keys": int64(BATCH, 5),
        "states": STATES,
        "rule": rule,
        "mask_logit": mask_logit,
        "guidance": guidance,
    }


def launch_tau_leap_uniform() -> None:
    tokens, keys = int64(BATCH, LENGTH), int64(BATCH, 5)
    for states in (STATES + 1, NARROW):
        logits = meta(BATCH, LENGTH, states, dtype=torch.float32)  # log-probabilities
        for rule in ("tau", "euler", "last"):
            tau_leap_uniform.launch(logits, tokens, coefficient(), coefficient(), keys, rule)


def launch_tau_leap_linear() -> None:
    hidden, weight, bias = meta(BATCH, LENGTH, WIDTH), meta(STATES + 1, WIDTH), meta(STATES + 1)
    for rule in ("tau", "ancestral"):
        for mask_logit in (False, True):
            tau_leap_linear.launch(hidden, weight, bias, **masked_step(rule, mask_logit), uncond=None)
    guided = masked_step("tau", False, coefficient()), masked_step("tau", True, coefficient())
    for step in guided:
        tau_leap_linear.launch(hidden, weight, bias, **step, uncond=hidden)
    float32 = hidden.float(), weight.float(), bias.float()
    unaligned = hidden[..., :99].contiguous(), weight[:, :99].contiguous(), bias
    for head in (float32, unaligned):
        tau_leap_linear.launch(*head, **masked_step("tau", False), uncond=None)
        tau_leap_linear.launch(*head, **masked_step("tau", True, coefficient()), uncond=head[0])


def heads() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, weight and bias: of the official network, also with odd states and in float32, and a small one."""
    for rows, states, width, dtype in (
        (BATCH_ROWS, STATES, WIDTH, torch.bfloat16),
        (BATCH_ROWS, STATES + 1, WIDTH, torch.bfloat16),
        (BATCH_ROWS, STATES, WIDTH, torch.float32),
        (768, 27, 80, torch.bfloat16),
    ):
        yield meta(rows, width, dtype=dtype), meta(states, width, dtype=dtype), meta(states, dtype=dtype)


def launch_linear_cross_entropy() -> None:
    for hidden, weight, bias in heads():
        target, loss = int64(len(hidden)), coefficient(len(hidden), torch.float32)
        linear_cross_entropy.launch_forward(hidden, weight, bias, target, 0.0)
        for needs in ([True, True, True], [True, True, False]):
            linear_cross_entropy.launch_backward(loss, hidden, weight, bias, target, loss, 1e-4, needs)


def launch_linear_cross_entropy_sum() -> None:
    for hidden, weight, bias in heads():
        target, loss = int64(len(hidden)), coefficient(len(hidden), torch.float32)
        linear_cross_entropy_sum.launch(hidden, weight, bias, target, loss, 0.0, hidden.dtype, [True] * 3)


def launch_adaln_modulate() -> None:
    for x, branch, modulation, plus_one in blocks():
        for out in {x.dtype, branch.dtype}:
            adaln.launch_adaln(x, modulation[0], modulation[1], 1e-5, plus_one, out)
            for kept in (None, x):
                grad = x.to(out)
                adaln.launch_adaln_backward(grad, kept, x, moments(x), modulation[0], plus_one)


def launch_gated_residual() -> None:
    for x, branch, modulation, _ in blocks():
        for bias in (None, meta(WIDTH, dtype=torch.float32)):
            gated_residual.launch_gate(x, branch, modulation[2], bias)
            gated_residual.launch_gate_backward(x, branch, modulation[2], bias)


def launch_gated_adaln() -> None:
    for x, branch, modulation, plus_one in blocks():
        for bias in (None, meta(WIDTH, dtype=torch.float32)):
            parts = branch, modulation[2], bias, modulation[0]
            gated_adaln.launch_gated_adaln(x, *parts, modulation[1], 1e-5, plus_one, branch.dtype)
            gated_adaln.launch_gated_adaln_backward(branch, x, x, moments(x), *parts, plus_one)


def launch_bias_gelu() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = meta(256, 256, 4 * WIDTH, dtype=dtype), meta(4 * WIDTH, dtype=torch.float32)
        bias_gelu.launch_gelu(x, bias)
        bias_gelu.launch_gelu_backward(x, x, bias)


def launch_qk_norm_pack() -> None:
    qkv = [meta(256, 256, 1536), meta(256, 120, 1536)]
    gammas = [meta(8, 64, dtype=torch.float32)] * 2
    grad = meta(256, 376, 8, 64)
    packing = meta(256, 376, dtype=torch.int32), meta(257, dtype=torch.int32)
    for rows, cu_k in (packing, (None, None)):
        qk_norm.launch_pack(qkv, gammas, gammas, rows, cu_k)
        qk_norm.launch_pack_backward(grad, grad, grad, qkv, gammas, gammas, rows, cu_k)


CASES: dict[str, Callable[[], None]] = {
    "random": launch_random,
    "gaussian_perturb": launch_gaussian_perturb,
    "mask_perturb": launch_mask_perturb,
    "uniform_perturb": launch_uniform_perturb,
    "eps_mse": launch_eps_mse,
    "heun": launch_heun,
    "dpmpp_2m": launch_dpmpp_2m,
    "tau_leap": launch_tau_leap,
    "tau_leap_uniform": launch_tau_leap_uniform,
    "tau_leap_linear": launch_tau_leap_linear,
    "linear_cross_entropy": launch_linear_cross_entropy,
    "linear_cross_entropy_sum": launch_linear_cross_entropy_sum,
    "adaln_modulate": launch_adaln_modulate,
    "gated_residual": launch_gated_residual,
    "gated_adaln": launch_gated_adaln,
    "bias_gelu": launch_bias_gelu,
    "qk_norm_pack": launch_qk_norm_pack,
}


# Compilation


def build(launch: Launch, capability: int) -> Build:
    """Resources of one launch, compiled for a compute capability."""
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    about = compiled.metadata
    return Build(registers, about.shared, stack + local, about.num_warps, getattr(about, "tmem_size", None) or 0)


def table(ops: list[str] | None = None, targets: tuple[int, ...] = TARGETS) -> list[Usage]:
    """One row per kernel and target: the maximum of each resource over the recorded launches, the minimum of CTAs."""
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: unset it to compile kernels")
    rows = []
    for op, launch_all in CASES.items():
        if ops and op not in ops:
            continue
        with recorded() as launches:
            launch_all()
        distinct = {repr(launch): launch for launch in launches}.values()
        for kernel in dict.fromkeys(launch.kernel for launch in distinct):
            for target in targets:
                builds = [build(launch, target) for launch in distinct if launch.kernel is kernel]
                registers, shared, spilled, warps, _ = (max(values) for values in zip(*builds, strict=True))
                fewest = min(one.ctas_per_sm(target) for one in builds)
                rows.append(Usage(op, kernel.__name__, f"sm_{target}", registers, shared, spilled, warps, fewest))
    return rows
