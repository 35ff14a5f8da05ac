"""The engine as a machine: the same draws however the work is cut, evaluations counted, bad input refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anystate.diffusion import Cosine, Gaussian, LogLinear, Masked, Space, Uniform
from anystate.model import MMDiT, Patches, Tokens
from anystate.sample import KINDS, Given, Sampler, sample

LENGTH, STATES = 6, 5


def made(tower: int) -> MMDiT:
    """A small real network whose outputs depend on every input: all weights, zeros included, get noise."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        streams = {"image": Patches(1, 4, 2, 32), "text": Tokens(LENGTH, STATES, 32, tower=tower)}
        model = MMDiT(streams, 2, 2, 16, time_scale=10.0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def net() -> MMDiT:
    return made(tower=0)


def space_of(process: type = Masked, order=("image", "text")) -> Space:
    """v prediction keeps the pictures of a random network of order one; else 1/α would blow them up."""
    parts = {
        "image": Gaussian((1, 4, 4), Cosine(), 1e-3, predicts="v"),
        "text": process(LENGTH, STATES, LogLinear(), 1e-3),
    }
    return Space({m: parts[m] for m in order})


@pytest.fixture
def space() -> Space:
    return space_of()


def texts(n: int) -> torch.Tensor:
    return torch.randint(STATES, (n, LENGTH), generator=torch.Generator().manual_seed(0))


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Spy:
    """Any network, with its calls noted: (batch size, outputs, times)."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, x, t, mask=None, outputs=None):
        self.calls.append((len(x["image"]), list(outputs), t))
        return self.net(x, t, mask, outputs)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[m], b[m]) for m in a) and a.keys() == b.keys()


# The same draws however the work is cut

WAYS = {
    "joint": lambda rows: {},
    "text_to_image": lambda rows: {"text": texts(20)[rows]},
    "image_to_text": lambda rows: {"image": images(20)[rows]},
    "noisy_text": lambda rows: {"text": (texts(20)[rows], 0.5)},
    "from_level": lambda rows: {"image": Given(images(20)[rows], 0.6, hold=False)},
}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_and_counts_do_not_change_a_bit(net, space, way):
    """Samples 0 … 19 in chunks of 4; then 3 … 8 alone, and the whole split over three uneven ranks."""
    given, options = WAYS[way], {"steps": 5, "seed": 11, "chunk": 4, "guidance": 2.0}
    whole = sample(net, space, given(slice(0, 20)), n=20, **options)
    part = sample(net, space, given(slice(3, 9)), n=6, first=3, **options)
    assert same(part, {m: x[3:9] for m, x in whole.items()})
    cuts = [(0, 7), (7, 14), (14, 20)]
    ranks = [sample(net, space, given(slice(a, b)), n=b - a, first=a, **options) for a, b in cuts]
    assert same({m: torch.cat([r[m] for r in ranks]) for m in space}, whole)


@pytest.mark.parametrize("kinds", [("heun", "tau_leap"), ("euler_sde", "ancestral"), ("dpmpp_2m", "first_hitting")])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_another_chunk_size_draws_the_same(net, space, kinds, chunk):
    """Rounding differs with the batch: images within 1e-4, at least 99.9% of the tokens equal."""
    options = {"n": 256 if chunk != 1 else 48, "steps": 4, "seed": 3}
    samplers = {"image": Sampler(kinds[0]), "text": Sampler(kinds[1])}
    a = sample(net, space, chunk=16, samplers=samplers, **options)
    b = sample(net, space, chunk=chunk, samplers=samplers, **options)
    assert (a["image"] - b["image"]).abs().max() < 1e-4
    assert (a["text"] == b["text"]).double().mean() >= 0.999


def test_samples_differ_from_each_other_and_between_seeds(net, space):
    """The other tests would pass on constant output."""
    one, two = (sample(net, space, n=32, steps=4, seed=s) for s in (0, 1))
    assert not same(one, two)
    assert len(one["text"].unique(dim=0)) > 24
    assert one["image"].std(0).min() > 0.1
    assert len({int(t) for t in one["text"].flatten()}) == STATES
    assert same(one, sample(net, space, n=32, steps=4, seed=0))


def test_output_depends_on_the_conditions(net, space):
    a, b = (sample(net, space, {"text": t}, steps=4) for t in (texts(8), texts(8).flip(0)))
    assert (a["image"] - b["image"]).abs().max() > 1e-3


@pytest.mark.parametrize("process", [Masked, Uniform])
def test_order_of_the_modalities_does_not_matter(net, process):
    a = sample(net, space_of(process), n=8, steps=4, guidance=2.0)
    b = sample(net, space_of(process, ("text", "image")), n=8, steps=4, guidance=2.0)
    assert same(a, b)
    assert list(b) == ["text", "image"]


# Evaluations


@pytest.mark.parametrize(("kind", "count"), [("heun", 9), ("euler", 5), ("euler_sde", 5), ("dpmpp_2m", 5)])
def test_evaluations_and_heads(net, space, kind, count):
    """Heun asks 2N − 1 times, the others N; a second evaluation asks for pictures only, a condition for nothing."""
    spy, samplers = Spy(net), {"image": Sampler(kind)}
    sample(spy, space, n=2, steps=5, samplers=samplers)
    assert len(spy.calls) == count
    both = [outputs for _, outputs, _ in spy.calls if outputs == ["image", "text"]]
    assert len(both) == 5
    assert all(outputs == ["image"] for _, outputs, _ in spy.calls if outputs not in both)
    spy.calls.clear()
    sample(spy, space, {"text": texts(2)}, steps=5, samplers=samplers)
    assert [outputs for _, outputs, _ in spy.calls] == [["image"]] * count
    spy.calls.clear()
    sample(spy, space, {"image": images(2)}, steps=5, samplers=samplers)
    assert [outputs for _, outputs, _ in spy.calls] == [["text"]] * 5


def test_heun_second_evaluation_is_ahead_in_the_picture_only(net, space):
    spy = Spy(net)
    sample(spy, space, n=2, steps=3, samplers={"image": Sampler(grid=torch.tensor([1.0, 0.6, 0.2, 0.0]))})
    image = [t["image"][0].item() for *_, t in spy.calls]
    sigma = space["image"].schedule.sigma(torch.tensor([1.0, 0.6, 0.6, 0.2, 0.2], dtype=torch.float64))
    assert image == pytest.approx(sigma.tolist(), rel=1e-6)
    # text walks linspace(1, 1e-3, 3) and stays put for the second evaluation
    assert [t["text"][0].item() for *_, t in spy.calls] == pytest.approx([1.0, 1.0, 0.5005, 0.5005, 1e-3], rel=1e-6)


def test_what_stands_still_costs_nothing(net, space):
    """A grid that stands still, and a modality that begins clean, ask for no evaluation of theirs."""
    spy = Spy(net)
    still = {"text": Sampler(grid=torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0]))}
    sample(spy, space, {"image": images(2)}, steps=4, samplers=still)
    assert len(spy.calls) == 2
    spy.calls.clear()
    out = sample(spy, space, {"image": Given(images(2), 0.0, hold=False)}, steps=4)
    assert [outputs for _, outputs, _ in spy.calls] == [["text"]] * 4
    assert torch.equal(out["image"], images(2))


def test_first_hitting_is_asked_once_per_token(net, space):
    spy = Spy(net)
    samplers = {"image": Sampler("euler"), "text": Sampler("first_hitting")}
    sample(spy, space, n=1, steps=12, samplers=samplers)
    assert len(spy.calls) == 12
    assert sum("text" in outputs for _, outputs, _ in spy.calls) == LENGTH
    spy.calls.clear()
    sample(spy, space, {"image": images(1)}, steps=12, samplers=samplers)
    assert len(spy.calls) == LENGTH


@pytest.mark.parametrize("tower", [0, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("given", [False, True])
def test_only_what_first_hitting_reveals_is_asked_for(space, tower, guidance, given):
    """The same samples as with whole answers, at two positions a sample at most, all of them together once."""
    net, n, asked = made(tower), 7, []

    def whole(x, t, mask=None, outputs=None):
        return net(x, t, mask, list(outputs))

    def spy(x, t, mask=None, outputs=None):
        if isinstance(outputs, dict) and "text" in outputs:
            places = outputs["text"]
            asked.extend(zip(places.samples.tolist(), places.position.tolist(), strict=True))
        return net(x, t, mask, outputs)

    spy.selects_rows = True
    known = {"image": images(n)} if given else {}
    options = {"steps": 4, "n": n, "seed": 5, "guidance": guidance, "samplers": {"text": Sampler("first_hitting")}}
    drawn, expected = (sample(f, space, known, **options) for f in (spy, whole))
    assert torch.equal(drawn["text"], expected["text"])
    torch.testing.assert_close(drawn["image"], expected["image"], rtol=1e-4, atol=1e-4)
    branches = 2 if given and guidance != 1.0 else 1  # drawn together, text guides and is not guided
    assert len(asked) == branches * n * LENGTH
    assert len(set(asked)) == len(asked)


# Trajectories, starts, ends


def test_trajectory_goes_from_noise_to_the_samples(net, space):
    out, states = sample(net, space, n=5, steps=4, chunk=2, first=3, trajectory=True)
    assert len(states) == 5
    assert all(set(state) == {"image", "text"} and len(state["image"]) == 5 for state in states)
    assert same(states[-1], out)
    assert bool((states[0]["text"] == STATES).all())
    masks = [int((state["text"] == STATES).sum()) for state in states]
    assert masks == sorted(masks, reverse=True)
    assert masks[-1] == 0
    moved = [(a["image"] - b["image"]).abs().max() for a, b in itertools.pairwise(states)]
    assert min(moved) > 0


def test_prior_noise_is_standard_normal(space):
    """Mean and variance of 8,192 numbers within 4σ: 1 seed in 8,000."""
    zero = {"image": torch.zeros(512, 1, 4, 4), "text": torch.zeros(512, LENGTH, STATES)}
    _, states = sample(
        lambda *a, outputs, **k: {m: zero[m] for m in outputs}, space, n=512, chunk=512, steps=1, trajectory=True
    )
    x = states[0]["image"]
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / x.numel())


def test_init_replaces_the_prior(net, space):
    noise = images(6)
    out, states = sample(net, space, n=6, steps=3, chunk=4, init={"image": noise}, trajectory=True)
    assert torch.equal(states[0]["image"], noise)
    other = sample(net, space, n=6, steps=3, chunk=4)
    assert not torch.equal(out["image"], other["image"])


def test_given_comes_back_as_the_network_saw_it(net, space):
    clean = sample(net, space, {"text": texts(4)}, steps=2)
    assert torch.equal(clean["text"], texts(4))
    noisy = torch.where(texts(4) > 2, STATES, texts(4))
    seen = sample(net, space, {"text": Given(noisy, 0.5, noised=True)}, steps=2)
    assert torch.equal(seen["text"], noisy)


def test_last_sde_update_adds_no_noise(net, space):
    samplers = {"image": Sampler("euler_sde")}
    given = {"text": texts(4)}
    a, b = (sample(net, space, given, steps=1, seed=s, init={"image": images(4)}, samplers=samplers) for s in (0, 1))
    assert torch.equal(a["image"], b["image"])
    a, b = (sample(net, space, given, steps=2, seed=s, init={"image": images(4)}, samplers=samplers) for s in (0, 1))
    assert not torch.equal(a["image"], b["image"])


@pytest.mark.parametrize("process", [Masked, Uniform])
def test_one_step_and_every_sampler_ends_in_valid_data(net, process):
    space = space_of(process)
    for image in KINDS[Gaussian]:
        for text in KINDS[process]:
            for steps in (1, 2, 9):
                out = sample(net, space, n=3, steps=steps, samplers={"image": Sampler(image), "text": Sampler(text)})
                space.check(out)
                assert bool(out["image"].isfinite().all()), (image, text, steps)


@pytest.mark.parametrize("kind", [*KINDS[Gaussian], *KINDS[Masked]])
def test_explicit_grid_equals_the_named_one(net, space, kind):
    """Every sampler takes the times themselves."""
    m = "image" if kind in KINDS[Gaussian] and kind != "euler" else "text"
    times = torch.cat([torch.linspace(1.0, 1e-3, 4, dtype=torch.float64), torch.zeros(1)])
    named, explicit = (sample(net, space, n=4, steps=4, samplers={m: Sampler(kind, g)}) for g in ("linear", times))
    assert same(named, explicit)


def test_network_returns_to_the_mode_it_was_in(net, space):
    modes = []

    class Watch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, *args, **kwargs):
            modes.append(self.training)
            return self.inner(*args, **kwargs)

    watch = Watch().train()
    watch.inner.eval()  # a part that is frozen stays so
    sample(watch, space, n=1, steps=2)
    assert watch.training
    assert not watch.inner.training
    assert modes == [False] * 3
    with pytest.raises(RuntimeError):
        sample(watch, space, steps=2, init={"image": images(1).to(torch.complex64)})  # fails inside the network
    assert watch.training
    watch.eval()
    sample(watch, space, n=1, steps=1)
    assert not watch.training


def test_pictures_in_double_precision_are_given_as_single(net, space):
    x = images(3)
    assert same(sample(net, space, {"image": x.double()}, steps=2), sample(net, space, {"image": x}, steps=2))


def test_no_gradients_are_recorded(net, space):
    assert not sample(net, space, n=1, steps=1)["image"].requires_grad


def test_default_number_of_samples(net, space):
    assert len(sample(net, space, steps=1)["text"]) == 1
    assert len(sample(net, space, {"text": texts(3)}, steps=1)["image"]) == 3


# Bad input

TWO = {"text": texts(2)}
BAD = {
    "unknown modality": ({"given": {"sound": texts(2)}}, "unknown modality 'sound'.*image, text"),
    "unknown modality, noised": ({"given": {"sound": Given(texts(2), 0.5, noised=True)}}, "unknown modality 'sound'"),
    "both given": ({"given": {**TWO, "image": images(2)}}, "nothing to generate"),
    "n mismatch": ({"given": TWO, "n": 3}, "2 given for n = 3"),
    "given of two sizes": ({"given": {**TWO, "image": Given(images(3), 0.5, hold=False)}}, "image: 3 given for n = 2"),
    "no samples": ({"n": 0}, "n must be at least 1"),
    "no steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "negative steps": ({"steps": -3}, "steps must be at least 1, got -3"),
    "no chunk": ({"chunk": 0}, "chunk must be at least 1"),
    "negative first": ({"first": -1}, "first must be at least 0"),
    "level above 1": ({"given": {"text": (texts(2), 1.5)}}, r"text: noise level must lie in \[0, 1\], got 1.5"),
    "level below 0": ({"given": {"text": (texts(2), -0.1)}}, "noise level"),
    "level not a number": ({"given": {"text": (texts(2), math.nan)}}, "noise level"),
    "wrong length": ({"given": {"text": texts(2)[:, :3]}}, r"text: expected samples of shape \(6,\), got \(3,\)"),
    "wrong length, noised": ({"given": {"text": Given(texts(2)[:, :3], 0.5, noised=True)}}, "text: expected samples"),
    "mask as data": ({"given": {"text": texts(2) + 1}}, r"text: tokens must lie in \[0, 5\)"),
    "tokens as numbers": ({"given": {"text": texts(2).float()}}, "text: expected int64"),
    "image of the wrong size": ({"given": {"image": torch.zeros(2, 1, 5, 5)}}, "image: expected samples of shape"),
    "guidance without a condition": ({"guidance": 2.0, "space": "image only"}, "guidance needs a condition"),
    "sampler of another process": ({"samplers": {"image": Sampler("tau_leap")}}, "image: sampler must be one of heun"),
    "unknown sampler": ({"samplers": {"text": Sampler("magic")}}, "text: sampler must be one of tau_leap.*'magic'"),
    "sampler of nothing": ({"samplers": {"sound": Sampler()}}, "samplers: unknown modality 'sound'"),
    "unknown grid": ({"samplers": {"text": Sampler(grid="log")}}, "grid must be one of"),
    "gaussian grid on text": ({"samplers": {"text": Sampler(grid="logsnr")}}, "grid logsnr is for Gaussian"),
    "short grid": ({"samplers": {"image": Sampler(grid=torch.tensor([1.0, 0.0]))}}, "a grid of 2 steps needs 3 times"),
    "rising grid": ({"samplers": {"image": Sampler(grid=torch.tensor([0.5, 1.0, 0.0]))}}, "falling from 1 to 0"),
    "unfinished grid": ({"samplers": {"image": Sampler(grid=torch.tensor([1.0, 0.5, 0.1]))}}, "falling from 1 to 0"),
    "late grid": ({"samplers": {"image": Sampler(grid=torch.tensor([0.7, 0.5, 0.0]))}}, "falling from 1 to 0"),
    "grid of nan": ({"samplers": {"image": Sampler(grid=torch.tensor([1.0, math.nan, 0.0]))}}, "falling from 1 to 0"),
    "init of nothing": ({"init": {"sound": images(1)}}, "init: unknown modality 'sound'"),
    "init of another number": ({"init": {"image": images(2)}, "n": 3}, "image: 2 starting states for n = 3"),
    "init of another shape": ({"init": {"image": images(1)[..., :2]}}, "image: expected samples of shape"),
    "init of what is given": ({"given": TWO, "init": {"text": texts(2)}}, "text: give data or a starting state"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_clear_line(net, space, case):
    arguments, message = BAD[case]
    arguments = {"steps": 2, **arguments}
    if arguments.pop("space", None):
        space = Space({"image": space["image"]})
    with pytest.raises(ValueError, match=message) as error:
        sample(net, space, **arguments)
    assert "\n" not in str(error.value)
