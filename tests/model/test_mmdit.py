"""Partial outputs of the network, streams that several processes share, and the names of parameters."""

from __future__ import annotations

import pytest
import torch

from anystate.model import MMDiT, Patches, Tokens
from anystate.model.streams import Categories, Features, Frames, Numbers, Stream

N, LENGTH, STATES = 4, 6, 5


def noisy_net(depth: int, single_stream_depth: int) -> MMDiT:
    """A small network with noise on all weights, those that are initialized with zero included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = Tokens(length=LENGTH, states=STATES, width=32, single_stream_depth=single_stream_depth)
        net = MMDiT({"image": Patches(channels=1, size=4, patch=2, width=32), "text": text}, depth, 2, 16)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("single_stream_depth", [0, 1, 2])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_logits_of_single_positions_equal_those_of_all_positions(depth, single_stream_depth, whole_blocks):
    """Two positions in one sample, none in others, in both halves of a doubled batch; images of the first half."""
    net, rng = noisy_net(depth, single_stream_depth), torch.Generator().manual_seed(1)
    net.whole_blocks = whole_blocks
    x = {
        "image": torch.randn(2 * N, 1, 4, 4, generator=rng),
        "text": torch.randint(STATES, (2 * N, LENGTH), generator=rng),
    }
    t = {m: torch.rand(2 * N, generator=rng) for m in x}
    mask = {"text": torch.rand(2 * N, LENGTH, generator=rng) < 0.7}
    chosen = torch.zeros(N, LENGTH, dtype=torch.bool)
    chosen[0, [1, 3]] = chosen[2, 0] = True
    chosen = torch.cat([chosen, chosen])
    index = chosen.flatten().nonzero()[:, 0]
    head_inputs = []
    net.head["text"].register_forward_pre_hook(lambda head, inputs: head_inputs.append(inputs[0].shape))
    with torch.no_grad():
        full = net(x, t, mask)
        part = net(x, t, mask, {"image": N, "text": None}, positions={"text": index})
    assert part["text"].values().shape == full["text"].values().shape
    torch.testing.assert_close(part["text"].values()[chosen], full["text"].values()[chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(part["image"], full["image"][:N], rtol=0, atol=1e-5)
    skipped = single_stream_depth > 0  # positions are skipped by single-stream blocks and what follows them
    assert head_inputs[1][:2] == ((6, 1) if skipped else (2 * N, LENGTH))


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_outputs_of_the_first_samples(whole_blocks):
    """{modality: n} gives the first n samples of the full outputs; modalities that are not named are left out."""
    net, rng = noisy_net(2, 1), torch.Generator().manual_seed(1)
    net.whole_blocks = whole_blocks
    x = {"image": torch.randn(N, 1, 4, 4, generator=rng), "text": torch.randint(STATES, (N, LENGTH), generator=rng)}
    t = {m: torch.rand(N, generator=rng) for m in x}
    with torch.no_grad():
        full, part = net(x, t), net(x, t, outputs={"text": 2})
    assert list(part) == ["text"]
    torch.testing.assert_close(part["text"].values(), full["text"].values()[:2], rtol=0, atol=1e-5)


WORDS, WAVE = 4, 5  # positions
SHARED = {  # a wave joins the stream of words
    "words": Tokens(length=WORDS, states=7, width=32, single_stream_depth=1),
    "pixels": Patches(channels=1, size=4, patch=2, width=24),
    "wave": Frames(channels=2, steps=2 * WAVE, patch=2, width=32, share="words"),
}
ALIGNED = SHARED | {"wave": Frames(channels=2, steps=2 * WORDS, patch=2, width=32, share="words", aligned=True)}
CELLS = {  # the columns of a table
    "num": Numbers(columns=3, width=32, sinusoids=2, observed=True),
    "cat": Categories(states=(2, 5), width=32, share="num"),
}


def random_net(parts: dict[str, Stream], depth: int = 2, seed: int = 0) -> MMDiT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MMDiT(parts, depth, 2, 16)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def random_data(parts: dict[str, Stream], n: int = N) -> tuple[dict, dict]:
    """(x, t) of n samples."""
    rng, x = torch.Generator().manual_seed(2), {}
    for k, part in parts.items():
        if isinstance(part, Tokens):
            x[k] = torch.randint(part.states + 1, (n, part.length), generator=rng)
        elif isinstance(part, Categories):
            x[k] = torch.stack([torch.randint(size, (n,), generator=rng) for size in part.states], 1)
        else:
            shape = {
                Patches: lambda p: (p.channels, p.size, p.size),
                Frames: lambda p: (p.channels, p.steps),
                Features: lambda p: (p.features,),
                Numbers: lambda p: (p.columns,),
            }[type(part)](part)
            x[k] = torch.randn(n, *shape, generator=rng)
    return x, {k: torch.rand(n, generator=rng) for k in x}


@torch.no_grad()
def run(net: MMDiT, x: dict, t: dict, *args, **options) -> dict[str, torch.Tensor]:
    """The outputs as tensors."""
    out = net(x, t, *args, **options)
    return {k: value if isinstance(value, torch.Tensor) else value.values() for k, value in out.items()}


def same(a: dict, b: dict, atol: float = 1e-5) -> None:
    assert list(a) == list(b)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=atol, msg=lambda message, k=k: f"{k}: {message}")


@pytest.mark.parametrize("parts", [SHARED, ALIGNED, CELLS, ALIGNED | CELLS], ids=["after", "aligned", "cells", "all"])
def test_outputs_of_shared_streams_have_the_shapes_of_the_processes(parts):
    net = random_net(parts)
    x, t = random_data(parts)
    out = run(net, x, t)
    assert list(out) == list(parts) == net.outputs
    for k, value in x.items():
        states = {"words": (7,), "cat": (5,)}.get(k, ())
        assert out[k].shape == (*value.shape, *states), k
    assert set(net.trunk[0].streams) == {k for k, part in parts.items() if part.share is None}
    for k in x:  # all depend on all
        other = x | {k: (x[k] + 1) % 2 if not x[k].is_floating_point() else x[k] + 1.0}
        changed = run(net, other, t)
        assert all((changed[j] - out[j]).nan_to_num(0.0, 0.0, 0.0).abs().max() > 1e-4 for j in out), k
        later = run(net, x, t | {k: t[k] + 0.5})
        assert all((later[j] - out[j]).nan_to_num(0.0, 0.0, 0.0).abs().max() > 1e-4 for j in out), k


def test_one_after_the_other_equals_two_streams_with_the_same_weights():
    """In the trunk: equal weights for both streams, and the sum of both time embeddings as conditioning of each."""
    parts = SHARED | {"words": Tokens(length=WORDS, states=7, width=32)}  # single-stream blocks attend to one stream
    shared = random_net(parts)
    apart = random_net(parts | {"wave": Frames(channels=2, steps=2 * WAVE, patch=2, width=32)}, seed=1)
    weights = shared.state_dict()
    copies = {key.replace(".words.", ".wave."): value for key, value in weights.items() if key.startswith("trunk")}
    apart.load_state_dict(copies | weights)
    for net in (shared, apart):  # of the two times, only that of the words counts
        for kind in ("weight", "bias"):
            torch.nn.init.zeros_(getattr(net.time["wave"].mlp[2], kind))
    apart.time["wave"] = apart.time["words"]
    x, t = random_data(parts)
    mask = {"words": torch.rand(N, WORDS, generator=torch.Generator().manual_seed(3)) < 0.6}
    for masks in (None, mask, mask | {"wave": torch.arange(WAVE).expand(N, -1) < 3}):
        same(run(shared, x, t, masks), run(apart, x, t | {"wave": t["words"]}, masks))


def test_aligned_processes_are_added():
    """A network of one process whose embedder gives the sum, with the head of either process."""
    shared = random_net(ALIGNED)
    x, t = random_data(ALIGNED)
    with torch.no_grad():
        total = shared.embed["words"](x["words"]) + shared.embed["wave"](x["wave"])
        time = shared.time["words"](t["words"]) + shared.time["wave"](t["wave"])
    out, weights = run(shared, x, t), shared.state_dict()

    class Given(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.value

    alone = random_net({"words": ALIGNED["words"], "pixels": ALIGNED["pixels"]})
    alone.load_state_dict({key: value for key, value in weights.items() if ".wave." not in key})
    alone.embed["words"], alone.time["words"] = Given(total), Given(time)
    ours = {k: x[k] for k in ("words", "pixels")}
    same(run(alone, ours, t), {k: out[k] for k in ours})
    alone.head["words"] = shared.head["wave"]
    torch.testing.assert_close(run(alone, ours, t)["words"], out["wave"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["words", "wave"])
def test_the_owner_of_a_stream_comes_first_in_it(first):
    """In whatever order the processes are given."""
    names = [first, *(k for k in ALIGNED if k != first)]
    net, other = random_net(ALIGNED), random_net({k: ALIGNED[k] for k in names}, seed=1)
    other.load_state_dict(net.state_dict())
    x, t = random_data(ALIGNED)
    theirs = run(other, x, t)
    same({k: theirs[k] for k in ALIGNED}, run(net, x, t))


@pytest.mark.parametrize("name", ["words", "wave"])
def test_masked_keys_of_a_shared_stream_change_nothing_else(name):
    """One after the other, also in single-stream blocks: hidden positions have no influence on all others."""
    net = random_net(SHARED)
    x, t = random_data(SHARED)
    shown = torch.ones(N, SHARED[name].tokens, dtype=torch.bool)
    shown[:, 1] = False
    other = {k: value.clone() for k, value in x.items()}
    if name == "words":
        other["words"][:, 1] = (x["words"][:, 1] + 1) % 7
    else:
        other["wave"][..., 2:4] += 1.0
    with_mask, changed = run(net, x, t, {name: shown}), run(net, other, t, {name: shown})
    for k in x:
        a, b = with_mask[k], changed[k]
        if k == name and k == "words":
            a, b = a[shown], b[shown]
        elif k == name:
            a, b = (v.unflatten(-1, (WAVE, 2)).transpose(1, 2)[shown] for v in (a, b))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (run(net, x, t)["pixels"] - run(net, other, t)["pixels"]).abs().max() > 1e-4
    assert (run(net, x, t)["pixels"] - with_mask["pixels"]).abs().max() > 1e-4


def test_masks_of_aligned_processes_are_joined():
    """A position is hidden if either of its processes hides it."""
    net = random_net(ALIGNED)
    x, t = random_data(ALIGNED)
    a = torch.tensor([True, True, False, True]).expand(N, -1)
    b = torch.tensor([False, True, True, True]).expand(N, -1)
    same(run(net, x, t, {"words": a, "wave": b}), run(net, x, t, {"wave": a & b}))
    assert (run(net, x, t, {"words": a})["pixels"] - run(net, x, t, {"wave": a & b})["pixels"]).abs().max() > 1e-4


@pytest.mark.parametrize("parts", [SHARED, ALIGNED], ids=["after", "aligned"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_outputs_of_the_first_samples_of_shared_streams(parts, depth, whole_blocks):
    net = random_net(parts, depth)
    net.whole_blocks = whole_blocks
    x, t = random_data(parts)
    mask = {"wave": torch.arange(parts["wave"].tokens).expand(N, -1) != 1}
    full = run(net, x, t, mask)
    for outputs in ({"words": 2}, {"wave": 3, "words": 1}, {"wave": None, "words": 2}, {"pixels": 1, "wave": 2}):
        same(run(net, x, t, mask, outputs), {k: full[k][:n] for k, n in outputs.items()})
    index = torch.tensor([1, WORDS + 2])  # a sampler may ask for single positions; a shared stream gives all
    same(run(net, x, t, mask, ["words"], positions={"words": index}), {"words": full["words"]})


def test_a_shared_stream_with_a_pure_condition():
    parts = SHARED | {"wave": Frames(channels=2, steps=2 * WAVE, patch=2, width=32, share="words", output=False)}
    net = random_net(parts)
    x, t = random_data(parts)
    assert net.outputs == ["words", "pixels"] == list(run(net, x, t))
    with pytest.raises(ValueError, match="no head for 'wave'; it has words, pixels"):
        net(x, t, outputs=["wave"])


def test_observed_cells_are_marked():
    net = random_net(CELLS)
    assert net.observes == ["num"]
    x, t = random_data(CELLS)
    none, full = torch.zeros(N, 3, dtype=torch.bool), run(net, x, t)
    same(run(net, x, t, observed={"num": none, "cat": torch.ones(N, 2, dtype=torch.bool)}), full)
    one = none.clone()
    one[1, 2] = True
    marked = run(net, x, t, observed={"num": one})
    assert (marked["num"][1] - full["num"][1]).abs().max() > 1e-4
    torch.testing.assert_close(marked["num"][[0, 2, 3]], full["num"][[0, 2, 3]], rtol=0, atol=1e-6)
    with torch.no_grad():  # the mark is a vector per column
        net.embed["num"].known[:2] = 0.0
    same(run(net, x, t, observed={"num": torch.tensor([True, True, False]).expand(N, -1)}), run(net, x, t))
    unmarked = random_net(CELLS | {"num": Numbers(columns=3, width=32, sinusoids=2)})
    assert unmarked.observes == []


def test_gradients_reach_every_parameter_of_shared_streams():
    for parts in (SHARED, ALIGNED, CELLS):
        net = random_net(parts).train()
        x, t = random_data(parts)
        observed = {"num": torch.ones(N, 3, dtype=torch.bool)} if "num" in x else None
        out = net(x, t, observed=observed)
        values = [value if isinstance(value, torch.Tensor) else value.values() for value in out.values()]
        sum((value.masked_fill(value.isinf(), 0.0) ** 2).sum() for value in values).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        ({"share": "sounds"}, "wave: stream.share names 'sounds', which has no stream of its own"),
        ({"share": "other"}, "wave: stream.share names 'other', which has no stream of its own"),
        ({"share": "words", "aligned": True}, "wave has 5 positions, words has 4: they cannot be aligned"),
        ({"share": "words", "width": 16}, "wave shares the stream of words, so it has its width 32 and cond 32"),
        ({"share": "words", "cond": 8}, "wave shares the stream of words, so it has its width 32 and cond 32"),
    ],
)
def test_processes_that_cannot_share_a_stream(wave, message):
    parts = {
        "words": Tokens(length=WORDS, states=7, width=32),
        "other": Features(features=4, patch=2, width=32, share="words"),
        "wave": Frames(**{"channels": 2, "steps": 2 * WAVE, "patch": 2, "width": 32, **wave}),
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        MMDiT(parts, 1, 2, 16)


BLOCK = ["modulation.weight", "modulation.bias", "qkv.weight", "q_gamma", "k_gamma", "out.weight"]
BLOCK += [f"ff.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
NAMES = {  # of the parameters in checkpoints
    *("embed.image.proj.weight", "embed.image.proj.bias", "embed.text.token.weight", "embed.text.position.weight"),
    *(f"time.{m}.mlp.{i}.{kind}" for m in ("image", "text") for i in (0, 2) for kind in ("weight", "bias")),
    *(f"trunk.{d}.streams.{m}.{name}" for d in (0, 1) for m in ("image", "text") for name in BLOCK),
    *(f"tower.text.0.streams.text.{name}" for name in BLOCK),
    *("trunk_norm.image.weight", "trunk_norm.text.weight", "tower_norm.text.weight"),
    *(f"head.{m}.{layer}.{kind}" for m in ("image", "text") for layer in ("modulate.linear", "linear")
      for kind in ("weight", "bias")),
}  # fmt: skip


def test_names_of_parameters_are_those_of_checkpoints():
    assert set(noisy_net(2, 1).state_dict()) == NAMES


def test_a_shared_stream_has_one_set_of_blocks():
    """Its processes have an embedder, a time embedding and a head each."""
    names = set(random_net(SHARED).state_dict())
    own = {name for name in names if ".wave." in name}
    assert {name.split(".")[0] for name in own} == {"embed", "time", "head"}
    unshared = {k: part for k, part in SHARED.items() if k != "wave"}
    assert names - own == set(random_net(unshared).state_dict())
