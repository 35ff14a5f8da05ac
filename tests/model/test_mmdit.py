"""Parts of the network's answer against the whole of it."""

from __future__ import annotations

import pytest
import torch

from anystate.kernels import Places
from anystate.model import MMDiT, Patches, Tokens

N, LENGTH, STATES = 4, 6, 5


def made(depth: int, tower: int) -> MMDiT:
    """All weights get noise, those that start at zero included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MMDiT({"image": Patches(1, 4, 2, 32), "text": Tokens(LENGTH, STATES, 32, tower=tower)}, depth, 2, 16)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("tower", [0, 1, 2])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_single_places_are_those_of_the_whole_answer(depth, tower, whole_blocks):
    """Two in one sample, none in others, in both halves of a doubled batch; other modalities as ever."""
    net, rng = made(depth, tower), torch.Generator().manual_seed(1)
    net.whole_blocks = whole_blocks
    x = {
        "image": torch.randn(2 * N, 1, 4, 4, generator=rng),
        "text": torch.randint(STATES, (2 * N, LENGTH), generator=rng),
    }
    t = {m: torch.rand(2 * N, generator=rng) for m in x}
    mask = {"text": torch.rand(2 * N, LENGTH, generator=rng) < 0.7}
    chosen = torch.zeros(N, LENGTH, dtype=torch.bool)
    chosen[0, [1, 3]] = chosen[2, 0] = True
    places = Places.where(chosen).twice(N)
    with torch.no_grad():
        whole, part = net(x, t, mask), net(x, t, mask, {"image": slice(0, N), "text": places})
    assert part["text"].hidden.shape[:2] == (6, 1)
    expected = whole["text"].values()[torch.cat([chosen, chosen])]
    torch.testing.assert_close(part["text"].values()[:, 0], expected, rtol=0, atol=1e-5)
    back = part["text"].placed(places, 2 * N, LENGTH).values()
    torch.testing.assert_close(back[torch.cat([chosen, chosen])], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(part["image"], whole["image"][:N], rtol=0, atol=1e-5)
