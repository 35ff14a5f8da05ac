"""Weights of the official text+image network, into ours and back.

Official modality order is text first, image second; a block's three conditioning layers per stream (attention
LayerNorm, feed-forward LayerNorm, branch gains) are one layer here, and its patch convolution is a linear map.
The official `text_depth: 0` network has no text head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mmdit import MMDiT, Patches, Tokens

PLAIN = {
    "text_embedder.weight": "embed.text.token.weight",
    "text_pos_embed.weight": "embed.text.position.weight",
    "image_embedder.proj.bias": "embed.image.proj.bias",
    **{
        f"{m}_time_encoder.mlp.{i}.{kind}": f"time.{m}.mlp.{i}.{kind}"
        for m in ("text", "image")
        for i in (0, 2)
        for kind in ("weight", "bias")
    },
    **{
        f"{m}_final_layer.{theirs}.{kind}": f"head.{m}.{ours}.{kind}"
        for m in ("text", "image")
        for theirs, ours in (("adaLN_modulation.2", "modulate.linear"), ("linear", "linear"))
        for kind in ("weight", "bias")
    },
    "joint_embedding.norms.0.g": "trunk_norm.text.weight",
    "joint_embedding.norms.1.g": "trunk_norm.image.weight",
    "text_dit.norms.0.g": "tower_norm.text.weight",
    "image_dit.norms.0.g": "tower_norm.image.weight",
}
STREAM = {
    "joint_attn.to_qkv.{i}.weight": "qkv.weight",
    "joint_attn.to_out.{i}.weight": "out.weight",
    "joint_attn.q_rmsnorms.{i}.gamma": "q_gamma",
    "joint_attn.k_rmsnorms.{i}.gamma": "k_gamma",
    "feedforwards.{i}.ff.0.0.weight": "ff.0.weight",
    "feedforwards.{i}.ff.0.0.bias": "ff.0.bias",
    "feedforwards.{i}.ff.2.weight": "ff.2.weight",
    "feedforwards.{i}.ff.2.bias": "ff.2.bias",
}
PATCH_WEIGHT, POSITION = "image_embedder.proj.weight", "pos_embed"


def _block_prefixes(keys) -> list[tuple[str, int, str]]:
    """(official prefix, official stream index, our prefix) of every stream of every block."""
    places = {("joint_embedding", 0): "text", ("joint_embedding", 1): "image"}
    places |= {("text_dit", 0): "text", ("image_dit", 0): "image"}
    found = []
    for (stack, i), m in places.items():
        ours = "trunk.{d}.streams." + m if stack == "joint_embedding" else f"tower.{m}.{{d}}.streams.{m}"
        depth = 0
        while f"{stack}.blocks.{depth}.joint_attn.to_qkv.{i}.weight" in keys:
            found.append((f"{stack}.blocks.{depth}", i, ours.format(d=depth)))
            depth += 1
    return found


def _modulation_keys(prefix: str, i: int, kind: str) -> tuple[str, str, str, str]:
    return (
        f"{prefix}.attn_layernorms.{i}.to_cond.2.{kind}",
        f"{prefix}.ff_layernorms.{i}.to_cond.2.{kind}",
        f"{prefix}.cond_dict.to_post_branch_gammas_{i}.2.{kind}",
        f"{prefix}.cond_dict.cond_linear_{i}.{kind}",  # the official module's second name
    )


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one, and the official keys that were not used.

    Raises:
        ValueError: a key that the network needs is missing.
    """
    ours, used = {}, {POSITION}  # the position table is a constant here

    def take(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"official checkpoint lacks {key!r}: is it a text+image snapshot?")
        used.add(key)
        return state[key]

    ours["embed.image.proj.weight"] = take(PATCH_WEIGHT).flatten(1)
    for theirs, key in PLAIN.items():
        if theirs in state:
            ours[key] = take(theirs)
    for prefix, i, target in _block_prefixes(state):
        for theirs, key in STREAM.items():
            value = take(f"{prefix}.{theirs.format(i=i)}")
            ours[f"{target}.{key}"] = value.squeeze(1) if key.endswith("gamma") else value
        for kind in ("weight", "bias"):
            attn, ff, gain, alias = _modulation_keys(prefix, i, kind)
            gains = take(gain if gain in state else alias).chunk(2)  # safetensors files hold one of the two names
            used |= {gain, alias}
            ours[f"{target}.modulation.{kind}"] = torch.cat([take(attn), gains[0], take(ff), gains[1]])
    return ours, sorted(set(state) - used)


def to_official(model: MMDiT) -> dict[str, Tensor]:
    """The official state dict of a text+image model built with this architecture."""
    ours = model.state_dict()
    embed = model.embed["image"]
    weight = ours["embed.image.proj.weight"]
    p = embed.patch
    theirs = {PATCH_WEIGHT: weight.unflatten(1, (-1, p, p)), POSITION: embed.position[None]}
    theirs |= {key: ours[target] for key, target in PLAIN.items() if target in ours}
    stacks = {"joint_embedding": [(d, ["text", "image"], f"trunk.{d}") for d in range(len(model.trunk))]}
    for m in model.tower:
        stacks[f"{m}_dit"] = [(d, [m], f"tower.{m}.{d}") for d in range(len(model.tower[m]))]
    for stack, blocks in stacks.items():
        for d, names, target in blocks:
            for i, m in enumerate(names):
                prefix, source = f"{stack}.blocks.{d}", f"{target}.streams.{m}"
                for key, part in STREAM.items():
                    value = ours[f"{source}.{part}"]
                    theirs[f"{prefix}.{key.format(i=i)}"] = value[:, None] if part.endswith("gamma") else value
                for kind in ("weight", "bias"):
                    attn, ff, gain, alias = _modulation_keys(prefix, i, kind)
                    six = ours[f"{source}.modulation.{kind}"].chunk(6)
                    theirs[attn], theirs[ff] = torch.cat([six[0], six[1]]), torch.cat([six[3], six[4]])
                    theirs[gain] = theirs[alias] = torch.cat([six[2], six[5]])
    return theirs


def streams(state: Mapping[str, Tensor]) -> tuple[dict[str, Patches | Tokens], int, int, int]:
    """What an official state dict describes: {name: stream}, joint depth, heads and their width, as MMDiT takes them.

    Raises:
        ValueError: a key that tells a size is missing.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"official checkpoint lacks {key!r}: is it a text+image snapshot?")
        return state[key].shape

    vocab, text_width = shape("text_embedder.weight")
    image_width, channels, patch, _ = shape(PATCH_WEIGHT)
    grid = round(shape(POSITION)[1] ** 0.5)
    heads, _, head_dim = shape("joint_embedding.blocks.0.joint_attn.q_rmsnorms.0.gamma")
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
        tower=depth["text_dit"],
        head="text_final_layer.linear.weight" in state,
    )
    image = Patches(
        channels=channels,
        size=grid * patch,
        patch=patch,
        width=image_width,
        cond=shape("image_time_encoder.mlp.2.bias")[0],
        tower=depth["image_dit"],
        head="image_final_layer.linear.weight" in state,
    )
    return {"text": text, "image": image}, depth["joint_embedding"], heads, head_dim


def architecture(state: Mapping[str, Tensor]) -> MMDiT:
    """An MMDiT of the shape that an official state dict describes; weights are not loaded."""
    return MMDiT(*streams(state))


def load_official(state: Mapping[str, Tensor]) -> tuple[MMDiT, list[str]]:
    """An MMDiT holding the weights of an official state dict, and the official keys left unused."""
    model = architecture(state)
    ours, unused = from_official(state)
    model.load_state_dict(ours)
    return model, unused
