"""Partial outputs of the network against its full outputs."""

from __future__ import annotations

import pytest
import torch

from anystate.model import MMDiT, Patches, Tokens

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
