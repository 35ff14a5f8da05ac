"""The operations that are measured and verified: inputs, floors and other implementations of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ... import kernels
from . import kernel_floors as floors
from . import kernel_inputs as inputs
from .kernel_floors import Work
from .kernel_inputs import STEPS, Arguments, Inputs


def call_once(operation: Callable, arguments: Arguments) -> object:
    return operation(**arguments)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with inputs, and what its speed is compared with.

    Args:
        inputs: makes the keyword arguments.
        work: (arguments, result) → least work of the forward pass; work_backward: of the backward pass.
        gradients: arguments that are differentiated in training.
        operation: name of the operation where it differs from the name of the case.
        call: runs an implementation on the arguments.
        baselines: returns {name: other implementation}.
    """

    inputs: Callable[[Inputs], Arguments]
    work: Callable[[Arguments, object], Work]
    work_backward: Callable[[Arguments, object], Work] | None = None
    gradients: tuple[str, ...] = ()
    operation: str | None = None
    call: Callable[[Callable, Arguments], object] = call_once
    baselines: Callable[[], dict[str, Callable]] = dict


def trajectory(operation: Callable, arguments: Arguments) -> Tensor:
    """STEPS steps from all masks to none, with constant logits."""
    tokens, rate = arguments["tokens"], torch.ones_like(arguments["rate"])
    for k in range(STEPS):
        rule = "last" if k == STEPS - 1 else "tau"
        tokens = operation(**arguments | {"tokens": tokens, "rate": rate / (STEPS - k), "rule": rule})
    return tokens


def poisson_counts(
    logits: Tensor, tokens: Tensor, rate: Tensor, keys: Tensor, states: int, rule: str = "tau", **_: object
) -> Tensor:
    """τ-leaping as in the official code: Poisson counts of jumps to every state at every position."""
    p = torch.softmax(logits.float(), -1)
    if rule == "last":
        drawn = torch.multinomial(p.flatten(0, 1), 1).view_as(tokens)
        return torch.where(tokens == states, drawn, tokens)
    counts = torch.poisson(p * rate.float()[:, None, None])
    return torch.where((tokens == states) & (counts.sum(-1) == 1), counts.argmax(-1), tokens)


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="none")


def first_output(operation: Callable, arguments: Arguments) -> Tensor:
    """The first output alone: the only one with gradients."""
    return outputs_of(operation(**arguments))[0]


def poisson_baseline() -> dict[str, Callable]:
    return {"poisson": poisson_counts}


def cross_entropy_baselines() -> dict[str, Callable]:
    """PyTorch's cross-entropy of materialized logits, and that of liger-kernel where it is installed."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return {"plain": plain_cross_entropy}
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, reduction="sum")
    return {
        "plain": plain_cross_entropy,
        "liger": lambda hidden, weight, bias, target: loss(weight, hidden, target, bias),
    }


def cross_entropy_sum_baselines() -> dict[str, Callable]:
    """The same in PyTorch, and liger-kernel's sum, in which all rows have the weight 1."""

    def plain(row_weight: Tensor, **arguments: Tensor) -> Tensor:
        return (row_weight * plain_cross_entropy(**arguments)).sum()

    others = {"plain": plain}
    if "liger" in (found := cross_entropy_baselines()):
        others["liger"] = lambda row_weight, **arguments: found["liger"](**arguments)
    return others


CASES = {
    "gaussian_perturb": Case(inputs.gaussian, floors.read_and_written),
    "mask_perturb": Case(inputs.mask, floors.read_and_written),
    "uniform_perturb": Case(inputs.uniform, floors.read_and_written),
    "eps_mse": Case(inputs.eps, floors.read_and_written, floors.eps_mse_backward, ("eps",)),
    "heun_predict": Case(inputs.step, floors.read_and_written),
    "heun_correct": Case(inputs.correct, floors.read_and_written),
    "sde_step": Case(inputs.sde, floors.read_and_written),
    "dpmpp_2m": Case(inputs.dpmpp, floors.read_and_written),
    "tau_leap": Case(inputs.leap, floors.leap, baselines=poisson_baseline),
    "tau_leap_guided": Case(inputs.leap_guided, floors.leap_guided, operation="tau_leap"),
    f"tau_leap_{STEPS}_steps": Case(
        inputs.leap_all_steps, floors.leap_all_steps, operation="tau_leap", call=trajectory, baselines=poisson_baseline
    ),
    "tau_leap_uniform": Case(inputs.leap_uniform, floors.leap),
    "tau_leap_linear": Case(inputs.leap_linear, floors.leap_linear),
    "linear_cross_entropy": Case(
        inputs.cross_entropy,
        floors.cross_entropy,
        floors.cross_entropy_backward,
        ("hidden", "weight", "bias"),
        baselines=cross_entropy_baselines,
    ),
    "linear_cross_entropy_sum": Case(
        inputs.cross_entropy_sum,
        floors.cross_entropy,
        floors.cross_entropy_backward,
        ("hidden", "weight", "bias"),
        call=first_output,
        baselines=cross_entropy_sum_baselines,
    ),
    "adaln_modulate": Case(inputs.adaln, floors.read_and_written, floors.adaln_backward, ("x", "scale", "shift")),
    "adaln_modulate_fp32_stream": Case(
        inputs.adaln_fp32_stream,
        floors.read_and_written,
        floors.adaln_backward,
        ("x", "scale", "shift"),
        operation="adaln_modulate",
    ),
    "adaln_modulate_fp32_result": Case(
        inputs.adaln_fp32_result,
        floors.read_and_written,
        floors.adaln_backward,
        ("x", "scale", "shift"),
        operation="adaln_modulate",
    ),
    "gated_residual": Case(inputs.gate, floors.read_and_written, floors.gate_backward, ("x", "branch", "gate")),
    "gated_residual_fp32_stream": Case(
        inputs.gate_fp32_stream,
        floors.read_and_written,
        floors.gate_backward,
        ("x", "branch", "gate", "bias"),
        operation="gated_residual",
    ),
    "gated_adaln": Case(
        inputs.gated_adaln,
        floors.gated_adaln,
        floors.gated_adaln_backward,
        ("x", "branch", "gate", "scale", "shift"),
    ),
    "gated_adaln_fp32_stream": Case(
        inputs.gated_adaln_fp32_stream,
        floors.gated_adaln,
        floors.gated_adaln_backward,
        ("x", "branch", "gate", "scale", "shift"),
        operation="gated_adaln",
    ),
    "gated_adaln_next_block": Case(
        inputs.gated_adaln_next_block,
        floors.gated_adaln,
        floors.gated_adaln_backward,
        ("x", "branch", "gate", "scale", "shift", "bias"),
        operation="gated_adaln",
    ),
    "gated_adaln_first_block": Case(
        inputs.gated_adaln_first_block,
        floors.gated_adaln,
        floors.gated_adaln_backward,
        ("x", "scale", "shift"),
        operation="gated_adaln",
    ),
    "bias_gelu": Case(inputs.gelu, floors.read_and_written, floors.adaln_backward, ("x", "bias")),
    "qk_norm_pack": Case(inputs.pack, floors.pack, floors.pack_backward, ("qkv", "q_gamma", "k_gamma")),
    "qk_norm_pack_keys": Case(
        inputs.pack_keys,
        floors.pack,
        floors.pack_backward,
        ("qkv", "q_gamma", "k_gamma"),
        operation="qk_norm_pack",
    ),
    "joint_attention": Case(inputs.attention, floors.attention, floors.attention_backward, ("q", "k", "v")),
    "joint_attention_padded": Case(
        inputs.attention_padded,
        floors.attention,
        floors.attention_backward,
        ("q", "k", "v"),
        operation="joint_attention",
    ),
}


def operation_of(name: str, module: ModuleType = kernels) -> Callable:
    """The operation of a case, from `kernels` or `kernels.reference`."""
    return getattr(module, CASES[name].operation or name)


def outputs_of(result: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def with_gradients(arguments: Arguments, names: tuple[str, ...]) -> tuple[Arguments, list[Tensor]]:
    """The arguments, with copies that require gradients for the named ones (tensors or lists), and the copies."""
    leaves, replaced = [], dict(arguments)
    for name in names:
        single = isinstance(arguments[name], Tensor)
        made = [value.detach().clone().requires_grad_() for value in outputs_of(arguments[name])]
        leaves += made
        replaced[name] = made[0] if single else made
    return replaced, leaves


def in_float64(arguments: Arguments) -> Arguments:
    """The same arguments with floating tensors in float64, in which the reference then computes."""
    return {name: to_float64(value) for name, value in arguments.items()}


def to_float64(value: object) -> object:
    if isinstance(value, list):
        return [to_float64(part) for part in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
