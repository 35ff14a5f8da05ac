"""Conversion of weights between the official text+image network and the MMDiT of this package.

In the official code, text is the first modality and image the second. The three conditioning layers of each stream of a
block (attention LayerNorm, feed-forward LayerNorm, branch gains) are one layer here, and the patch convolution is a
linear layer. With the official setting `text_depth: 0`, the network has no text head; with `qk_rmsnorm: false`, queries
and keys have no gammas, and the number of heads cannot be seen in the weights.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from ..mmdit import MMDiT
from ..streams import Patches, Tokens


def _key_map() -> dict[str, str]:
    """{official key: key here} of everything outside the blocks, except the patch convolution."""
    keys = {
        "text_embedder.weight": "embed.text.token.weight",
        "text_pos_embed.weight": "embed.text.position.weight",
        "image_embedder.proj.bias": "embed.image.proj.bias",
        "joint_embedding.norms.0.g": "trunk_norm.text.weight",
        "joint_embedding.norms.1.g": "trunk_norm.image.weight",
        "text_dit.norms.0.g": "tower_norm.text.weight",
        "image_dit.norms.0.g": "tower_norm.image.weight",
    }
    for m in ("text", "image"):
        for kind in ("weight", "bias"):
            keys[f"{m}_time_encoder.mlp.0.{kind}"] = f"time.{m}.mlp.0.{kind}"
            keys[f"{m}_time_encoder.mlp.2.{kind}"] = f"time.{m}.mlp.2.{kind}"
            keys[f"{m}_final_layer.adaLN_modulation.2.{kind}"] = f"head.{m}.modulate.linear.{kind}"
            keys[f"{m}_final_layer.linear.{kind}"] = f"head.{m}.linear.{kind}"
    return keys


KEYS = _key_map()
STREAM_KEYS = {  # of stream i of a block
    "joint_attn.to_qkv.{i}.weight": "qkv.weight",
    "joint_attn.to_out.{i}.weight": "out.weight",
    "joint_attn.q_rmsnorms.{i}.gamma": "q_gamma",
    "joint_attn.k_rmsnorms.{i}.gamma": "k_gamma",
    "feedforwards.{i}.ff.0.0.weight": "ff.0.weight",
    "feedforwards.{i}.ff.0.0.bias": "ff.0.bias",
    "feedforwards.{i}.ff.2.weight": "ff.2.weight",
    "feedforwards.{i}.ff.2.bias": "ff.2.bias",
}
HEADS = 8  # the official default
PATCH_WEIGHT, POSITION = "image_embedder.proj.weight", "pos_embed"


def _block_prefixes(keys: Container[str]) -> list[tuple[str, int, str]]:
    """(official prefix, official stream index, prefix here) of every stream of every block."""
    stacks = (
        ("joint_embedding", 0, "text"),
        ("joint_embedding", 1, "image"),
        ("text_dit", 0, "text"),
        ("image_dit", 0, "image"),
    )
    found = []
    for stack, i, m in stacks:
        ours = "trunk" if stack == "joint_embedding" else f"tower.{m}"
        depth = 0
        while f"{stack}.blocks.{depth}.joint_attn.to_qkv.{i}.weight" in keys:
            found.append((f"{stack}.blocks.{depth}", i, f"{ours}.{depth}.streams.{m}"))
            depth += 1
    return found


def _modulation_keys(prefix: str, i: int, kind: str) -> tuple[str, str, str, str]:
    """The official keys of the conditioning of stream i: attention, feed-forward, gains, and the gains' second name."""
    return (
        f"{prefix}.attn_layernorms.{i}.to_cond.2.{kind}",
        f"{prefix}.ff_layernorms.{i}.to_cond.2.{kind}",
        f"{prefix}.cond_dict.to_post_branch_gammas_{i}.2.{kind}",
        f"{prefix}.cond_dict.cond_linear_{i}.{kind}",
    )


class _OfficialState:
    """An official state dict that records which keys are used."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state
        self.used: set[str] = set()

    def take(self, key: str) -> Tensor:
        """The tensor of a key.

        Raises:
            ValueError: the key is missing.
        """
        if key not in self.state:
            raise ValueError(f"official checkpoint lacks {key!r}: is it a text+image snapshot?")
        self.used.add(key)
        return self.state[key]

    def shape(self, key: str) -> torch.Size:
        return self.take(key).shape


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of an MMDiT from an official one, and the official keys that were not used.

    Raises:
        ValueError: a key that the network needs is missing.
    """
    official = _OfficialState(state)
    official.used.add(POSITION)  # the position table is a constant here
    ours = {"embed.image.proj.weight": official.take(PATCH_WEIGHT).flatten(1)}
    for key, target in KEYS.items():
        if key in state:
            ours[target] = official.take(key)
    for prefix, i, target in _block_prefixes(state):
        for key, name in STREAM_KEYS.items():
            if name.endswith("gamma") and not has_qk_norm(state):
                continue
            value = official.take(f"{prefix}.{key.format(i=i)}")
            ours[f"{target}.{name}"] = value.squeeze(1) if name.endswith("gamma") else value
        for kind in ("weight", "bias"):
            attn, ff, gain, alias = _modulation_keys(prefix, i, kind)
            gains = official.take(gain if gain in state else alias).chunk(2)  # safetensors files have one of the names
            official.used |= {gain, alias}
            parts = [official.take(attn), gains[0], official.take(ff), gains[1]]
            ours[f"{target}.modulation.{kind}"] = torch.cat(parts)
    return ours, sorted(set(state) - official.used)


def has_qk_norm(state: Mapping[str, Tensor]) -> bool:
    """Whether an official network normalizes queries and keys (`qk_rmsnorm: true`, its default)."""
    return any("_rmsnorms." in key for key in state)


def to_official(model: MMDiT) -> dict[str, Tensor]:
    """The official state dict of a text+image model of this architecture."""
    ours = model.state_dict()
    embed = model.embed["image"]
    patches = ours["embed.image.proj.weight"].unflatten(1, (-1, embed.patch, embed.patch))
    official = {PATCH_WEIGHT: patches, POSITION: embed.position[None]}
    for key, target in KEYS.items():
        if target in ours:
            official[key] = ours[target]
    for d in range(len(model.trunk)):
        for i, m in enumerate(("text", "image")):
            official |= _official_stream(ours, f"joint_embedding.blocks.{d}", i, f"trunk.{d}.streams.{m}")
    for m, blocks in model.tower.items():
        for d in range(len(blocks)):
            official |= _official_stream(ours, f"{m}_dit.blocks.{d}", 0, f"tower.{m}.{d}.streams.{m}")
    return official


def _official_stream(ours: Mapping[str, Tensor], prefix: str, i: int, source: str) -> dict[str, Tensor]:
    """The official tensors of stream i of the block `prefix`, from those of `source` here."""
    official = {}
    for key, name in STREAM_KEYS.items():
        if f"{source}.{name}" not in ours:
            continue  # a network without qk_norm has no gammas
        value = ours[f"{source}.{name}"]
        official[f"{prefix}.{key.format(i=i)}"] = value[:, None] if name.endswith("gamma") else value
    for kind in ("weight", "bias"):
        attn, ff, gain, alias = _modulation_keys(prefix, i, kind)
        parts = ours[f"{source}.modulation.{kind}"].chunk(6)
        official[attn] = torch.cat([parts[0], parts[1]])
        official[ff] = torch.cat([parts[3], parts[4]])
        official[gain] = official[alias] = torch.cat([parts[2], parts[5]])
    return official


def streams(
    state: Mapping[str, Tensor], heads: int | None = None
) -> tuple[dict[str, Patches | Tokens], int, int, int, float, bool]:
    """The architecture of an official state dict, as the arguments of MMDiT.

    Returns {modality: stream}, depth of the joint trunk, number of heads, width of a head, scale of times (1), and
    whether queries and keys are normalized.

    Args:
        heads: for a network without normalization of queries and keys, whose weights do not show it; default 8.

    Raises:
        ValueError: a key that determines a size is missing, or another number of heads than the weights show.
    """
    shape = _OfficialState(state).shape
    vocab, text_width = shape("text_embedder.weight")
    image_width, channels, patch, _ = shape(PATCH_WEIGHT)
    grid = round(shape(POSITION)[1] ** 0.5)
    heads, head_dim = _heads(state, heads)
    depth = dict.fromkeys(("joint_embedding", "text_dit", "image_dit"), 0)
    for prefix, _, _ in _block_prefixes(state):
        stack, _, index = prefix.split(".")
        depth[stack] = max(depth[stack], int(index) + 1)
    text = Tokens(
        length=shape("text_pos_embed.weight")[0],
        states=vocab - 1,
        columns=vocab,
        width=text_width,
        cond=shape("text_time_encoder.mlp.2.bias")[0],
        single_stream_depth=depth["text_dit"],
        output="text_final_layer.linear.weight" in state,
    )
    image = Patches(
        channels=channels,
        size=grid * patch,
        patch=patch,
        width=image_width,
        cond=shape("image_time_encoder.mlp.2.bias")[0],
        single_stream_depth=depth["image_dit"],
        output="image_final_layer.linear.weight" in state,
    )
    return {"text": text, "image": image}, depth["joint_embedding"], heads, head_dim, 1.0, has_qk_norm(state)


def _heads(state: Mapping[str, Tensor], heads: int | None) -> tuple[int, int]:
    """Number and width of the attention heads."""
    shape = _OfficialState(state).shape
    if has_qk_norm(state):
        found, _, head_dim = shape("joint_embedding.blocks.0.joint_attn.q_rmsnorms.0.gamma")
        if heads not in (None, found):
            raise ValueError(f"--heads {heads}: the weights have {found} heads")
        return found, head_dim
    inner = shape("joint_embedding.blocks.0.joint_attn.to_qkv.0.weight")[0] // 3
    heads = HEADS if heads is None else heads
    if heads < 1 or inner % heads:
        raise ValueError(f"--heads {heads} does not divide the {inner} features of the attention")
    return heads, inner // heads


def architecture(state: Mapping[str, Tensor], heads: int | None = None) -> MMDiT:
    """An MMDiT of the architecture of an official state dict, without its weights."""
    return MMDiT(*streams(state, heads))


def load_official(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[MMDiT, list[str]]:
    """An MMDiT with the weights of an official state dict, and the official keys that were not used."""
    model = architecture(state, heads)
    ours, unused = from_official(state)
    model.load_state_dict(ours)
    return model, unused
