"""Choice of backend, checks of arguments, and registration with torch.compile and autograd."""

import pytest
import torch

from anystate import kernels
from anystate.kernels import backend, reference


@pytest.fixture
def good(random, tokens, keys, device):
    """{operation: valid keyword arguments}."""
    x, rows, k = random(2, 3, 8), random(2).abs() + 0.1, keys(2)
    text, logits = tokens(2, 3, high=5), random(2, 3, 5)
    step = {"x": x, "eps": x, "beta": rows, "sigma": rows, "dt": -rows}
    head = {"hidden": x[0], "weight": random(5, 8), "bias": random(5), "target": text[0]}
    return {
        "uniform": {"keys": k, "n": 5},
        "normal": {"keys": k, "n": 5},
        "gaussian_perturb": {"x": x, "alpha": rows, "sigma": rows, "keys": k},
        "mask_perturb": {"tokens": text, "prob": rows, "keys": k, "mask_id": 5},
        "uniform_perturb": {"tokens": text, "prob": rows, "keys": k, "states": 5},
        "eps_mse": {"eps": x, "keys": k},
        "heun_predict": step,
        "heun_correct": step | {"x_hat": x},
        "sde_step": step | {"keys": k},
        "dpmpp_2m": {"x": x, "eps": x, "x0_prev": x} | dict.fromkeys(("alpha", "sigma", "decay", "gain", "mix"), rows),
        "tau_leap": {"logits": logits, "tokens": text, "rate": rows, "keys": k, "states": 5},
        "tau_leap_uniform": {"logits": logits, "tokens": text, "rate": rows, "odds": rows, "keys": k},
        "tau_leap_linear": {
            "hidden": x,
            "weight": random(5, 8),
            "bias": None,
            "tokens": text,
            "rate": rows,
            "keys": k,
            "states": 5,
        },
        "linear_cross_entropy": head,
        "linear_cross_entropy_sum": head | {"row_weight": random(3)},
        "adaln_modulate": {"x": x, "scale": random(2, 8), "shift": random(2, 8)},
        "gated_residual": {"x": x, "branch": x, "gate": random(2, 8)},
        "gated_adaln": {"x": x, "branch": x, "gate": random(2, 8), "scale": random(2, 8), "shift": random(2, 8)},
        "bias_gelu": {"x": x, "bias": random(8)},
        "qk_norm_pack": {
            "qkv": [random(2, 3, 12)],
            "q_gamma": [random(2, 2)],
            "k_gamma": [random(2, 2)],
            "heads": 2,
        },
        "joint_attention": {"q": random(2, 3, 2, 4), "k": random(2, 3, 2, 4), "v": random(2, 3, 2, 4)},
    }


NO_OPERATIONS = {"ColumnGroup", "ColumnLogits", "Draw", "LazyLogits", "Packing", "Rng", "pack_keys"}
OPERATIONS = sorted(set(kernels.__all__) - NO_OPERATIONS)

# operation, argument, function from a valid value to an invalid one
BAD = [
    ("uniform", "keys", lambda v: v.int()),
    ("uniform", "keys", lambda v: v[:, :4]),
    ("uniform", "sub", lambda v: 4),
    ("gaussian_perturb", "x", lambda v: v.long()),
    ("gaussian_perturb", "alpha", lambda v: v[:1]),
    ("gaussian_perturb", "keys", lambda v: v[:1]),
    ("mask_perturb", "tokens", lambda v: v.int()),
    ("mask_perturb", "tokens", lambda v: v + 9),
    ("mask_perturb", "mask_id", lambda v: 0),
    ("uniform_perturb", "tokens", lambda v: v - 9),
    ("uniform_perturb", "states", lambda v: 0),
    ("eps_mse", "eps", lambda v: v.long()),
    ("heun_predict", "eps", lambda v: v[:, :1]),
    ("heun_predict", "dt", lambda v: v[:1]),
    ("heun_predict", "uncond", lambda v: torch.zeros(1)),
    ("heun_correct", "x_hat", lambda v: v.long()),
    ("sde_step", "keys", lambda v: v.double()),
    ("dpmpp_2m", "x0_prev", lambda v: v[:1]),
    ("tau_leap", "rule", lambda v: "heun"),
    ("tau_leap", "states", lambda v: 0),
    ("tau_leap", "states", lambda v: 6),
    ("tau_leap", "logits", lambda v: v[:, :2]),
    ("tau_leap", "mask_logit", lambda v: True),
    ("tau_leap", "tokens", lambda v: v + 9),
    ("tau_leap", "rate", lambda v: v[:1]),
    ("tau_leap", "uncond", lambda v: torch.zeros(2, 3, 4)),
    ("tau_leap", "guidance", lambda v: torch.zeros(3)),
    ("tau_leap_uniform", "logits", lambda v: v[..., :0]),
    ("tau_leap_uniform", "rule", lambda v: "ancestral"),
    ("tau_leap_uniform", "tokens", lambda v: torch.full_like(v, 5)),
    ("tau_leap_uniform", "odds", lambda v: v[:1]),
    ("tau_leap_linear", "hidden", lambda v: v[..., :4]),
    ("tau_leap_linear", "weight", lambda v: v[:4]),
    ("tau_leap_linear", "weight", lambda v: v.bfloat16()),
    ("tau_leap_linear", "bias", lambda v: torch.zeros(4)),
    ("linear_cross_entropy", "weight", lambda v: v[:0]),
    ("linear_cross_entropy", "weight", lambda v: v.half()),
    ("linear_cross_entropy", "bias", lambda v: v[:3]),
    ("linear_cross_entropy", "target", lambda v: v - 9),
    ("linear_cross_entropy", "target", lambda v: v[:1]),
    ("linear_cross_entropy", "hidden", lambda v: v[None]),
    ("linear_cross_entropy_sum", "row_weight", lambda v: v[:1]),
    ("linear_cross_entropy_sum", "bias", lambda v: v[:3]),
    ("adaln_modulate", "x", lambda v: v[0]),
    ("adaln_modulate", "shift", lambda v: v[:, :4]),
    ("gated_residual", "branch", lambda v: v[:, :1]),
    ("gated_residual", "gate", lambda v: v.long()),
    ("gated_residual", "bias", lambda v: torch.zeros(3)),
    ("gated_adaln", "branch", lambda v: v[:, :1]),
    ("gated_adaln", "scale", lambda v: v[:1]),
    ("gated_adaln", "bias", lambda v: torch.zeros(2, 8)),
    ("bias_gelu", "x", lambda v: v.long()),
    ("bias_gelu", "bias", lambda v: v[:3]),
    ("qk_norm_pack", "qkv", lambda v: []),
    ("qk_norm_pack", "q_gamma", lambda v: []),
    ("qk_norm_pack", "k_gamma", lambda v: [v[0][:1]]),
    ("joint_attention", "k", lambda v: v[..., :1]),
    ("joint_attention", "v", lambda v: v[:, :1]),
    ("joint_attention", "key_mask", lambda v: torch.ones(2, 3)),
]
# the argument that the message names, where it is not the changed one
NAMED = {("tau_leap", "states"): "logits", ("tau_leap", "mask_logit"): "logits"}
NAMED |= {("tau_leap_linear", "hidden"): "weight"}


@pytest.mark.parametrize("chosen", ["triton", "reference"])
@pytest.mark.parametrize(("operation", "argument", "spoil"), BAD)
def test_bad_arguments_are_named(operation, argument, spoil, chosen, good, device, monkeypatch):
    monkeypatch.setattr(backend, "checks_cuda_values", lambda: True)
    arguments = good[operation]
    value = spoil(arguments.get(argument))
    if isinstance(value, torch.Tensor):
        value = value.to(device)
    named = argument if isinstance(value, int) and value == 0 else NAMED.get((operation, argument), argument)
    with pytest.raises(ValueError, match=f"^{named}: "):
        getattr(kernels, operation)(**arguments | {argument: value}, backend=chosen)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_device_mix_is_refused(operation, good):
    """The last tensor of each operation is on another device."""
    arguments = dict(good[operation])
    tensors = [name for name, value in arguments.items() if isinstance(value, (torch.Tensor, list))]
    if len(tensors) < 2:
        pytest.skip("takes one tensor only")
    last = arguments[tensors[-1]]
    arguments[tensors[-1]] = [value.to("meta") for value in last] if isinstance(last, list) else last.to("meta")
    with pytest.raises(ValueError, match=rf"^{tensors[-1]}: must be on"):
        getattr(kernels, operation)(**arguments, backend="triton")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_reference_takes_the_same_arguments(operation, good):
    ours = getattr(kernels, operation)(**good[operation], backend="reference")
    theirs = getattr(reference, operation)(**good[operation])
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


def test_choice(monkeypatch):
    cpu = torch.zeros(1)
    monkeypatch.delenv("ANYSTATE_BACKEND", raising=False)
    assert not backend.use_triton(None, cpu)
    assert not backend.use_triton("auto", cpu)
    assert backend.use_triton("triton", cpu) if backend.INTERPRETED else True
    monkeypatch.setenv("ANYSTATE_BACKEND", "reference")
    assert not backend.use_triton(None, cpu)
    monkeypatch.setenv("ANYSTATE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^backend: must be one of auto, triton, reference, got 'fast'"):
        backend.use_triton(None, cpu)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^backend: triton needs"):
        backend.use_triton("triton", cpu)


def test_float64_is_for_the_reference(good):
    arguments = {name: value.double() if name == "x" else value for name, value in good["gaussian_perturb"].items()}
    assert kernels.gaussian_perturb(**arguments, backend="reference").dtype == torch.float64
    with pytest.raises(ValueError, match=r"^x: Triton kernels take"):
        kernels.gaussian_perturb(**arguments, backend="triton")


COMPILED = sorted(set(OPERATIONS) - {"tau_leap", "tau_leap_linear", "tau_leap_uniform"})


@pytest.mark.parametrize("chosen", ["triton", "reference"])
@pytest.mark.parametrize("operation", COMPILED)
def test_compiles_without_a_graph_break(operation, chosen, good):
    """Without τ-leaping, whose reference selects a data-dependent number of rows; its kernels are tested below."""
    run = compiled(operation)
    ours, eager = run(**good[operation], backend=chosen), getattr(kernels, operation)(**good[operation], backend=chosen)
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (ours, eager)), strict=True):
        if operation == "joint_attention":  # compiled, the reference of narrow heads is another formula
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("operation", ["tau_leap", "tau_leap_linear", "tau_leap_uniform"])
def test_leaping_kernels_compile_without_a_graph_break(operation, good):
    run = compiled(operation)
    eager = getattr(kernels, operation)(**good[operation], backend="triton")
    assert torch.equal(run(**good[operation], backend="triton"), eager)


def compiled(operation):
    torch.compiler.reset()
    return torch.compile(getattr(kernels, operation), fullgraph=True, backend="aot_eager")


def registered(good):
    """{operation of torch.ops.anystate: arguments}; differentiable arguments require gradients."""

    def leaf(value):
        return value.clone().requires_grad_()

    x, rows, k, text = (good["tau_leap_linear"][n] for n in ("hidden", "rate", "keys", "tokens"))
    logits, gate, bias = good["tau_leap"]["logits"], good["gated_residual"]["gate"], good["bias_gelu"]["bias"]
    head, qk = good["linear_cross_entropy"], good["qk_norm_pack"]
    packing = kernels.Packing.of(text > 1)
    return {
        "draw": (k, 5, 0, True),
        "gaussian_perturb": (x, rows, rows, k),
        "token_perturb": (text, rows, k, 5, True),
        "eps_mse": (leaf(x), k),
        "gaussian_step": (x, None, x, x, rows, rows, rows, -rows, k, 1.0, "sde"),
        "dpmpp_2m": (x, x, None, None, x, rows, rows, rows, rows, rows),
        "tau_leap": (logits, text, rows, k, 5, "tau", False, None, None),
        "tau_leap_uniform": (logits, text, rows, rows, k, "tau"),
        "tau_leap_linear": (x, head["weight"], None, text, rows, k, 5, "tau", False, None, None),
        "linear_cross_entropy": (leaf(head["hidden"]), leaf(head["weight"]), leaf(head["bias"]), head["target"], 0.1),
        "linear_cross_entropy_sum": (
            *(leaf(head[name]) for name in ("hidden", "weight", "bias")),
            *(head["target"], good["linear_cross_entropy_sum"]["row_weight"], 0.1, torch.float32, [True] * 3),
        ),
        "adaln_modulate": (leaf(x), leaf(gate), leaf(gate), 1e-5, True, torch.float32),
        "gated_residual": (leaf(x), leaf(x), leaf(gate), leaf(bias)),
        "gated_adaln": (leaf(x), leaf(x), leaf(gate), leaf(bias), leaf(gate), leaf(gate), 1e-5, True, torch.float32),
        "bias_gelu": (leaf(x), leaf(bias)),
        "qk_norm_pack": (
            *([leaf(value) for value in qk[name]] for name in ("qkv", "q_gamma", "k_gamma")),
            *packing[::2],
        ),
    }


NAMES = (
    *("draw", "gaussian_perturb", "token_perturb", "eps_mse", "gaussian_step", "dpmpp_2m", "tau_leap"),
    *(
        "tau_leap_uniform",
        "tau_leap_linear",
        "linear_cross_entropy",
        "adaln_modulate",
        "gated_residual",
        "gated_adaln",
        "bias_gelu",
    ),
    *("linear_cross_entropy_sum", "qk_norm_pack"),
)


@pytest.mark.parametrize("name", NAMES)
def test_registration(name, good):
    """Schema, fake implementation, autograd and AOT dispatch pass torch.library.opcheck."""
    torch.library.opcheck(getattr(torch.ops.anystate, name).default, registered(good)[name])


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "joint_attention"])
def test_kernels_run_on_the_gpu_of_their_tensors(name, good, monkeypatch, small_blocks):
    """Triton launches on the current GPU, so operations make the GPU of their first tensor current."""
    small_blocks("tau_leap_linear", BLOCK_R=16)
    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or device_of(x))
    arguments = good[name]
    getattr(kernels, name)(**arguments, backend="triton")
    first = next(iter(arguments.values()))
    first = first[0] if isinstance(first, list) else first
    assert [x.data_ptr() for x in entered] == [first.data_ptr()]
