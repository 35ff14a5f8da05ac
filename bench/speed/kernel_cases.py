"""What the kernels are measured and verified on: inputs of each operation at three sizes, and its floor.

`tiny` is for Triton's interpreter, `small` for a laptop, `official` the shapes of the official text+image network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ... import kernels
from ...kernels import Draw, Rng


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes. `batch` is for training, `sampled` for sampling; `rows` go into the cross-entropy."""

    batch: int
    sampled: int
    latent: tuple[int, int, int]
    patches: int
    length: int
    states: int
    width: int
    heads: int
    head_width: int
    rows: int


SIZES = {
    "tiny": Size(2, 2, (2, 5, 5), 4, 6, 70, 24, 2, 8, 9),
    "small": Size(8, 4, (4, 16, 16), 64, 32, 1000, 128, 4, 32, 256),
    "official": Size(256, 64, (4, 32, 32), 256, 120, 49408, 1024, 8, 64, 30720),
}
STEPS = 50


class Inputs:
    """Makes the tensors of a case: fixed by a seed, on one device, in one dtype where that is free."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype):
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.to(dtype or self.dtype)

    def tokens(self, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, self.size.states, shape, generator=self.generator, device=self.device)

    def half_masked(self) -> Tensor:
        """(sampled, length) tokens of a trajectory at t = ½."""
        tokens = self.tokens(self.size.sampled, self.size.length)
        tokens[torch.rand(tokens.shape, generator=self.generator, device=self.device) < 0.5] = self.size.states
        return tokens

    def keys(self, n: int) -> Tensor:
        return Rng.for_batch(0, n, device=self.device).keys("bench", Draw.STEP)

    def per_sample(self, n: int, value: float) -> Tensor:
        return torch.full((n,), value, device=self.device, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation: its keyword arguments, its least work (bytes, FLOPs) forward and backward, and its peers.

    `gradients` names the arguments that training differentiates; `call` runs an implementation on the arguments.
    """

    inputs: Callable[[Inputs], dict]
    work: Callable[[dict, object], tuple[int, int]]
    work_backward: Callable[[dict, object], tuple[int, int]] | None = None
    gradients: tuple[str, ...] = ()
    operation: str | None = None
    call: Callable[[Callable, dict], object] = lambda operation, arguments: operation(**arguments)
    peers: Callable[[], dict[str, Callable]] = dict


def nbytes(*values) -> int:
    """Bytes of tensors, lists of them, and None."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif value is not None:
            total += nbytes(*value)
    return total


# Inputs


def gaussian(i: Inputs) -> dict:
    x = i.normal(i.size.batch, *i.size.latent, dtype=torch.float32)
    rows = i.per_sample(i.size.batch, 0.6)
    return {"x": x, "alpha": rows, "sigma": rows, "keys": i.keys(i.size.batch)}


def mask(i: Inputs) -> dict:
    n = i.size.batch
    return {
        "tokens": i.tokens(n, i.size.length),
        "prob": i.per_sample(n, 0.5),
        "keys": i.keys(n),
        "mask_id": i.size.states,
    }


def uniform(i: Inputs) -> dict:
    arguments = mask(i)
    return arguments | {"states": arguments.pop("mask_id")}


def eps(i: Inputs) -> dict:
    return {"eps": i.normal(i.size.batch, *i.size.latent), "keys": i.keys(i.size.batch)}


def step(i: Inputs) -> dict:
    """A guided step: float32 state, two branches of network output."""
    n = i.size.sampled
    return {
        "x": i.normal(n, *i.size.latent, dtype=torch.float32),
        "eps": i.normal(n, *i.size.latent),
        "uncond": i.normal(n, *i.size.latent),
        "guidance": i.per_sample(n, 3.0),
        "beta": i.per_sample(n, 1.5),
        "sigma": i.per_sample(n, 0.8),
        "dt": i.per_sample(n, -0.02),
    }


def correct(i: Inputs) -> dict:
    arguments = step(i)
    return arguments | {"x_hat": arguments["x"] + 0.1}


def sde(i: Inputs) -> dict:
    return step(i) | {"keys": i.keys(i.size.sampled)}


def dpmpp(i: Inputs) -> dict:
    arguments, n = step(i), i.size.sampled
    values = {"alpha": 0.7, "sigma": 0.7, "decay": 0.9, "gain": 0.1, "mix": 0.5}
    kept = {name: arguments[name] for name in ("x", "eps", "uncond", "guidance")}
    return kept | {"x0_prev": arguments["x"]} | {name: i.per_sample(n, value) for name, value in values.items()}


def leap(i: Inputs) -> dict:
    n, length, states = i.size.sampled, i.size.length, i.size.states
    return {
        "logits": i.normal(n, length, states),
        "tokens": i.half_masked(),
        "rate": i.per_sample(n, 2.0 / STEPS),
        "keys": i.keys(n),
        "states": states,
    }


def leap_all_steps(i: Inputs) -> dict:
    arguments = leap(i)
    return arguments | {"tokens": torch.full_like(arguments["tokens"], i.size.states)}


def leap_guided(i: Inputs) -> dict:
    arguments = leap(i)
    other = i.normal(*arguments["logits"].shape)
    return arguments | {"uncond": other, "guidance": i.per_sample(i.size.sampled, 2.0)}


def leap_uniform(i: Inputs) -> dict:
    n, length = i.size.sampled, i.size.length
    rate = i.per_sample(n, 1.0 / (STEPS * i.size.states))
    return {
        "logits": i.normal(n, length, i.size.states),
        "tokens": i.tokens(n, length),
        "rate": rate,
        "odds": i.per_sample(n, float(i.size.states)),
        "keys": i.keys(n),
    }


def leap_linear(i: Inputs) -> dict:
    n, length, states, width = i.size.sampled, i.size.length, i.size.states, i.size.width
    return {
        "hidden": i.normal(n, length, width),
        "weight": i.normal(states, width) * width**-0.5,
        "bias": i.normal(states),
        "tokens": i.half_masked(),
        "rate": i.per_sample(n, 2.0 / STEPS),
        "keys": i.keys(n),
        "states": states,
    }


def cross_entropy(i: Inputs) -> dict:
    rows, states, width = i.size.rows, i.size.states, i.size.width
    weight = i.normal(states, width) * width**-0.5
    return {
        "hidden": i.normal(rows, width),
        "weight": weight,
        "bias": i.normal(states),
        "target": i.tokens(rows, low=-1),
    }


def adaln(i: Inputs, stream: torch.dtype | None = None) -> dict:
    n, width = i.size.batch, i.size.width
    x = i.normal(n, i.size.patches, width, dtype=stream)
    return {"x": x, "scale": i.normal(n, width), "shift": i.normal(n, width)}


def gate(i: Inputs, stream: torch.dtype | None = None) -> dict:
    shape = i.size.batch, i.size.patches, i.size.width
    x, branch = i.normal(*shape, dtype=stream), i.normal(*shape)
    return {"x": x, "branch": branch, "gate": i.normal(i.size.batch, i.size.width)}


def adaln_fp32_stream(i: Inputs) -> dict:
    """As in training under autocast: the residual stream is float32, the modulation bfloat16."""
    return adaln(i, torch.float32)


def gate_fp32_stream(i: Inputs) -> dict:
    """As in training under autocast: the residual stream is float32, branch and gate are bfloat16."""
    return gate(i, torch.float32)


def pack(i: Inputs) -> dict:
    heads, width = i.size.heads, i.size.head_width
    qkv = [i.normal(i.size.batch, length, 3 * heads * width) for length in (i.size.patches, i.size.length)]
    gammas = [[i.normal(heads, width, dtype=torch.float32) for _ in qkv] for _ in range(2)]
    return {"qkv": qkv, "q_gamma": gammas[0], "k_gamma": gammas[1], "heads": heads}


def attention(i: Inputs) -> dict:
    shape = (i.size.batch, i.size.patches + i.size.length, i.size.heads, i.size.head_width)
    return {"q": i.normal(*shape), "k": i.normal(*shape), "v": i.normal(*shape)}


def attention_padded(i: Inputs) -> dict:
    """Captions fill a third of the text positions."""
    arguments = attention(i)
    key_mask = torch.ones(arguments["q"].shape[:2], dtype=torch.bool, device=i.device)
    key_mask[:, i.size.patches + i.size.length // 3 :] = False
    return arguments | {"key_mask": key_mask}


# Work and peers


def moves(a: dict, out: Tensor) -> int:
    """Rows of logits that have to be read, counted off the result."""
    return int((out != a["tokens"]).sum())


def row_bytes(a: dict) -> int:
    return a["logits"].shape[-1] * a["logits"].element_size()


def read_and_written(a: dict, out) -> tuple[int, int]:
    """Every floating or token tensor read once and every output written once; keys and per-sample numbers are free."""
    large = [v for v in a.values() if isinstance(v, Tensor) and v.ndim > 1 and v.shape[1:] != (5,)]
    return nbytes(*large) + nbytes(out), 0


def adaln_backward_work(a: dict, out: Tensor) -> tuple[int, int]:
    """x and the upstream gradient are read, one gradient is written."""
    return 2 * nbytes(a["x"]) + nbytes(out), 0


def gate_backward_work(a: dict, out: Tensor) -> tuple[int, int]:
    """The branch and the upstream gradient are read, the branch's gradient is written; x's is the upstream one."""
    return 2 * nbytes(a["branch"]) + nbytes(out), 0


def head_products(a: dict) -> int:
    """Multiplications and additions of every row with the head."""
    return 2 * len(a["hidden"]) * a["weight"].numel()


def attention_work(a: dict, out: Tensor) -> tuple[int, int]:
    q = a["q"]
    keys = int(a["key_mask"].sum()) if "key_mask" in a else q.shape[0] * q.shape[1]
    return 4 * nbytes(q), 4 * q.shape[1] * keys * q.shape[2] * q.shape[3]


def leap_linear_work(a: dict, out: Tensor) -> tuple[int, int]:
    rows, width = moves(a, out), a["hidden"].shape[-1]
    head = nbytes(a["weight"], a["bias"]) if rows else 0
    return 2 * nbytes(out) + head + rows * width * a["hidden"].element_size(), 2 * rows * a["weight"].numel()


def trajectory(operation: Callable, arguments: dict) -> Tensor:
    """STEPS steps from all masks to none, on the same logits."""
    tokens, rate = arguments["tokens"], torch.ones_like(arguments["rate"])
    for k in range(STEPS):
        rule = "last" if k == STEPS - 1 else "tau"
        tokens = operation(**arguments | {"tokens": tokens, "rate": rate / (STEPS - k), "rule": rule})
    return tokens


def poisson_counts(logits, tokens, rate, keys, states, rule="tau", **_) -> Tensor:
    """The eager form: counts of jumps to every state at every position, as the official code makes them."""
    p = torch.softmax(logits.float(), -1)
    if rule == "last":
        drawn = torch.multinomial(p.flatten(0, 1), 1).view_as(tokens)
        return torch.where(tokens == states, drawn, tokens)
    counts = torch.poisson(p * rate.float()[:, None, None])
    return torch.where((tokens == states) & (counts.sum(-1) == 1), counts.argmax(-1), tokens)


def plain_cross_entropy(hidden, weight, bias, target) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="none")


def cross_entropy_peers() -> dict[str, Callable]:
    """The plain form, and liger-kernel's where it is installed."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return {"plain": plain_cross_entropy}
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, reduction="sum")
    return {
        "plain": plain_cross_entropy,
        "liger": lambda hidden, weight, bias, target: loss(weight, hidden, target, bias),
    }


CASES = {
    "gaussian_perturb": Case(gaussian, read_and_written),
    "mask_perturb": Case(mask, read_and_written),
    "uniform_perturb": Case(uniform, read_and_written),
    "eps_mse": Case(eps, read_and_written, lambda a, out: (2 * nbytes(a["eps"]), 0), ("eps",)),
    "heun_predict": Case(step, read_and_written),
    "heun_correct": Case(correct, read_and_written),
    "sde_step": Case(sde, read_and_written),
    "dpmpp_2m": Case(dpmpp, read_and_written),
    "tau_leap": Case(
        leap,
        lambda a, out: (2 * nbytes(out) + moves(a, out) * row_bytes(a), 0),
        peers=lambda: {"poisson": poisson_counts},
    ),
    "tau_leap_guided": Case(
        leap_guided,
        lambda a, out: (2 * nbytes(out) + 2 * moves(a, out) * row_bytes(a), 0),
        operation="tau_leap",
    ),
    f"tau_leap_{STEPS}_steps": Case(
        leap_all_steps,
        lambda a, out: (2 * STEPS * nbytes(out) + moves(a, out) * row_bytes(a), 0),
        operation="tau_leap",
        call=trajectory,
        peers=lambda: {"poisson": poisson_counts},
    ),
    "tau_leap_uniform": Case(leap_uniform, lambda a, out: (2 * nbytes(out) + moves(a, out) * row_bytes(a), 0)),
    "tau_leap_linear": Case(leap_linear, leap_linear_work),
    "linear_cross_entropy": Case(
        cross_entropy,
        lambda a, out: (nbytes(a["hidden"], a["weight"]), head_products(a)),
        lambda a, out: (2 * nbytes(a["hidden"], a["weight"]), 2 * head_products(a)),
        ("hidden", "weight", "bias"),
        peers=cross_entropy_peers,
    ),
    "adaln_modulate": Case(adaln, read_and_written, adaln_backward_work, ("x", "scale", "shift")),
    "adaln_modulate_fp32_stream": Case(
        adaln_fp32_stream, read_and_written, adaln_backward_work, ("x", "scale", "shift"), "adaln_modulate"
    ),
    "gated_residual": Case(gate, read_and_written, gate_backward_work, ("x", "branch", "gate")),
    "gated_residual_fp32_stream": Case(
        gate_fp32_stream, read_and_written, gate_backward_work, ("x", "branch", "gate"), "gated_residual"
    ),
    "qk_norm_pack": Case(
        pack,
        lambda a, out: (2 * nbytes(a["qkv"]), 0),
        lambda a, out: (8 * nbytes(a["qkv"]) // 3, 0),
        ("qkv", "q_gamma", "k_gamma"),
    ),
    "joint_attention": Case(
        attention,
        attention_work,
        lambda a, out: (8 * nbytes(a["q"]), attention_work(a, out)[1] * 5 // 2),
        ("q", "k", "v"),
    ),
    "joint_attention_padded": Case(
        attention_padded,
        attention_work,
        lambda a, out: (8 * nbytes(a["q"]), attention_work(a, out)[1] * 5 // 2),
        ("q", "k", "v"),
        operation="joint_attention",
    ),
}


def operation_of(name: str, module=kernels) -> Callable:
    """The operation of a case, from `kernels` or `kernels.reference`."""
    return getattr(module, CASES[name].operation or name)


def outputs_of(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def with_gradients(arguments: dict, names: tuple[str, ...]) -> tuple[dict, list[Tensor]]:
    """The arguments with leaves in place of the named ones (tensors or lists of them), and the leaves."""
    leaves, replaced = [], dict(arguments)
    for name in names:
        single = isinstance(arguments[name], Tensor)
        made = [value.detach().clone().requires_grad_() for value in outputs_of(arguments[name])]
        leaves += made
        replaced[name] = made[0] if single else made
    return replaced, leaves


def widened(arguments: dict) -> dict:
    """The same arguments in float64; the reference then computes in float64."""

    def wide(value):
        if isinstance(value, list):
            return [wide(part) for part in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in arguments.items()}
