"""Official networks without normalization of queries and keys (`qk_rmsnorm: false`), whose weights show no heads."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anystate.model import MMDiT, Patches, Tokens
from anystate.model.official.text_image import load_official, to_official
from anystate.sample.pipeline import Pipeline

HEADS, B = 4, 3
State = Mapping[str, Tensor]


def plain_network(
    state: State, x: dict[str, Tensor], t: dict[str, Tensor], heads: int, text_mask: Tensor | None = None
):
    """(image prediction, text logits) of an official state dict, in PyTorch alone.

    text_mask: (B, L) bool, True for keys that are attended to.
    """
    patch = state["image_embedder.proj.weight"].shape[-1]
    image = F.conv2d(x["image"], state["image_embedder.proj.weight"], state["image_embedder.proj.bias"], patch)
    grid = image.shape[-1]
    streams = [
        state["text_embedder.weight"][x["text"]] + state["text_pos_embed.weight"],
        image.flatten(2).transpose(1, 2) + state["pos_embed"],
    ]
    c = [F.silu(time_embedding(state, f"{m}_time_encoder", t[m])) for m in ("text", "image")]
    keys = torch.cat([torch.ones(s.shape[:2], dtype=torch.bool) for s in streams], 1)
    if text_mask is not None:
        keys[:, : text_mask.shape[1]] = text_mask
    streams = run_blocks(state, "joint_embedding", streams, c, heads, keys)
    streams = [normalized(stream) * state[f"joint_embedding.norms.{i}.g"] for i, stream in enumerate(streams)]
    own = keys.split([s.shape[1] for s in streams], 1)
    out = {}
    for i, m in enumerate(("text", "image")):
        (h,) = run_blocks(state, f"{m}_dit", [streams[i]], [c[i]], heads, own[i])
        h = normalized(h) * state[f"{m}_dit.norms.0.g"]
        shift, scale = linear(state, f"{m}_final_layer.adaLN_modulation.2", c[i]).chunk(2, -1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * scale[:, None] + shift[:, None]
        out[m] = linear(state, f"{m}_final_layer.linear", h)
    pixels = out["image"].unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, -1))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), out["text"]


def time_embedding(state: State, prefix: str, t: Tensor) -> Tensor:
    omega = torch.exp(-math.log(10000.0) / 128 * torch.arange(128)).to(state["pos_embed"])
    angle = t.float()[:, None] * omega
    features = torch.cat([angle.cos(), angle.sin()], -1)
    return linear(state, f"{prefix}.mlp.2", F.silu(linear(state, f"{prefix}.mlp.0", features)))


def run_blocks(state: State, stack: str, streams: list[Tensor], c: list[Tensor], heads: int, keys: Tensor):
    depth = 0
    while f"{stack}.blocks.{depth}.joint_attn.to_qkv.0.weight" in state:
        streams = block(state, f"{stack}.blocks.{depth}", streams, c, heads, keys)
        depth += 1
    return streams


def block(state: State, prefix: str, streams: list[Tensor], c: list[Tensor], heads: int, keys: Tensor):
    queries, all_keys, values = [], [], []
    for i, x in enumerate(streams):
        y = modulated(state, f"{prefix}.attn_layernorms.{i}.to_cond.2", x, c[i])
        qkv = y @ state[f"{prefix}.joint_attn.to_qkv.{i}.weight"].T
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, Dh) each
        gammas = [state.get(f"{prefix}.joint_attn.{name}_rmsnorms.{i}.gamma") for name in "qk"]
        if gammas[0] is not None:
            q, k = normalized(q) * gammas[0], normalized(k) * gammas[1]
        queries.append(q), all_keys.append(k), values.append(v)
    q, k, v = (torch.cat(parts, 2) for parts in (queries, all_keys, values))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~keys[:, None, None], -math.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = []
    for i, (x, part) in enumerate(zip(streams, attended.split([x.shape[1] for x in streams], 1), strict=True)):
        gates = linear(state, f"{prefix}.cond_dict.to_post_branch_gammas_{i}.2", c[i]).chunk(2, -1)
        x = x + (part @ state[f"{prefix}.joint_attn.to_out.{i}.weight"].T) * gates[0][:, None]
        y = modulated(state, f"{prefix}.ff_layernorms.{i}.to_cond.2", x, c[i])
        y = F.gelu(linear(state, f"{prefix}.feedforwards.{i}.ff.0.0", y))
        out.append(x + linear(state, f"{prefix}.feedforwards.{i}.ff.2", y) * gates[1][:, None])
    return out


def modulated(state: State, prefix: str, x: Tensor, c: Tensor) -> Tensor:
    gamma, beta = linear(state, prefix, c).chunk(2, -1)
    return F.layer_norm(x, x.shape[-1:]) * gamma[:, None] + beta[:, None]


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def linear(state: State, prefix: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def network(qk_norm: bool = False, dtype: torch.dtype = torch.float32) -> MMDiT:
    """An official architecture of small size, with noise on all weights."""
    text = Tokens(length=6, states=9, columns=10, width=24, cond=20, single_stream_depth=1)
    image = Patches(channels=3, size=8, patch=2, width=32, cond=20, single_stream_depth=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MMDiT({"text": text, "image": image}, 2, HEADS, 12, qk_norm=qk_norm)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.25)
    return net.to(dtype).eval()


def data(dtype: torch.dtype) -> tuple[dict, dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = {"text": torch.randint(10, (B, 6), generator=generator)}
    x["image"] = torch.randn(B, 3, 8, 8, generator=generator).to(dtype)
    t = {m: torch.rand(B, generator=generator) for m in x}
    return x, t, torch.rand(B, 6, generator=generator) < 0.6


def outputs(net: MMDiT, x: dict, t: dict, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = net(x, t, None if mask is None else {"text": mask})
    return out["image"], out["text"].values()


def test_the_plain_network_is_the_official_one(golden, close):
    state = golden.below("weights/")
    heads = state["joint_embedding.blocks.0.joint_attn.q_rmsnorms.0.gamma"].shape[0]
    for case in ("all", "masked"):
        x = {"text": golden[f"net/{case}/tokens"], "image": golden[f"net/{case}/image"]}
        t = {m: golden[f"net/{case}/{m}_time"] for m in x}
        mask = golden.tensors.get(f"net/{case}/text_mask")
        image, text = plain_network(state, x, t, heads, mask)
        close(image, golden[f"net/{case}/out_image"], 1e-4, f"{case} image")
        theirs = torch.cat([torch.log_softmax(text[..., :-1], -1), text[..., -1:]], -1)
        close(theirs, golden[f"net/{case}/out_text"], 1e-4, f"{case} text")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_outputs_equal_those_of_the_plain_network(dtype, atol, is_masked, close):
    state = {key: value.to(dtype) for key, value in to_official(network(dtype=dtype)).items()}
    assert not [key for key in state if "rmsnorm" in key]
    net, unused = load_official(state, HEADS)
    assert unused == []
    x, t, mask = data(dtype)
    mask = mask if is_masked else None
    image, text = outputs(net.to(dtype).eval(), x, t, mask)
    expected_image, expected_text = plain_network(state, x, t, HEADS, mask)
    assert expected_image.std() > 0.1
    close(image, expected_image, atol, "image")
    close(text, expected_text, atol, "text")
    other, _ = plain_network(state, x, t, 2, mask)  # the number of heads matters
    assert (other - expected_image).abs().max() > 1e-2


@pytest.fixture
def imported(tmp_path, call):
    """imported(state, *options) → the pipeline of an import by the command line."""

    def run(state, *options) -> Pipeline:
        torch.save({"ema": state}, tmp_path / "snapshot.pt")
        tokenizer = ("--vae", tmp_path / "no-vae", "--tokenizer", tmp_path / "no-tokenizer")
        assert call("import-official", tmp_path / "snapshot.pt", "--out", tmp_path / "run", *options, *tokenizer) == 0
        return tmp_path / "run"

    return run


def test_the_command_imports_them(imported, close, monkeypatch):
    net = network()
    run = imported(to_official(net), "--heads", HEADS)
    (folder,) = run.glob("step_*")
    config = (folder / "config.yaml").read_text()
    assert "qk_norm: false" in config
    assert f"heads: {HEADS}" in config
    pipeline = Pipeline.from_pretrained(run)
    x, t, mask = data(torch.float32)
    for ours, theirs in zip(outputs(pipeline.net, x, t, mask), outputs(net, x, t, mask), strict=True):
        close(ours, theirs, 1e-6)


def test_eight_heads_are_the_default(imported):
    pipeline = Pipeline.from_pretrained(imported(to_official(network())))
    assert pipeline.net.trunk[0].heads == 8
    assert pipeline.config.network.head_dim == 6


@pytest.mark.parametrize(
    ("qk_norm", "options", "message"),
    [
        (False, ["--heads", "5"], "--heads 5 does not divide the 48 features of the attention"),
        (False, ["--heads", "0"], "'--heads'"),
        (True, ["--heads", "8"], "--heads 8: the weights have 4 heads"),
        (
            True,
            ["--heads", "4", "--table", "adult"],
            "--heads is for text and images; with --table, set network.heads=N",
        ),
    ],
)
def test_wrong_heads_are_one_line(qk_norm, options, message, tmp_path, refused):
    torch.save({"ema": to_official(network(qk_norm))}, tmp_path / "snapshot.pt")
    assert message in refused("import-official", tmp_path / "snapshot.pt", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_missing_gamma_is_named_if_others_are_there():
    state = to_official(network(qk_norm=True))
    del state["joint_embedding.blocks.1.joint_attn.k_rmsnorms.1.gamma"]
    with pytest.raises(ValueError, match=r"blocks\.1\.joint_attn\.k_rmsnorms\.1\.gamma"):
        load_official(state)
