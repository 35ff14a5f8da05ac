"""`sample`: batching does not change the samples, evaluations of the network are counted, bad input is refused."""

from __future__ import annotations

import ast
import inspect
import itertools
import math

import pytest
import torch

from anystate.diffusion import Cosine, Gaussian, LogLinear, Masked, Space, Uniform
from anystate.model import MMDiT, Patches, Tokens
from anystate.sample import SAMPLERS, Condition, Sampler, sample
from anystate.sample.run import Run

LENGTH, STATES = 6, 5


def noisy_net(single_stream_depth: int) -> MMDiT:
    """A small network whose outputs depend on every input: noise on all weights, zero-initialized ones included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = Tokens(length=LENGTH, states=STATES, width=32, single_stream_depth=single_stream_depth)
        model = MMDiT(
            {"image": Patches(channels=1, size=4, patch=2, width=32), "text": text}, 2, 2, 16, time_scale=10.0
        )
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def net() -> MMDiT:
    return noisy_net(single_stream_depth=0)


def space_of(process: type = Masked, order=("image", "text")) -> Space:
    """With ε-prediction, a random network's images would grow with 1/α; v-prediction keeps them of order one."""
    parts = {
        "image": Gaussian((1, 4, 4), Cosine(), 1e-3, prediction_type="v_prediction"),
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


def uniforms_of(noise: torch.Tensor) -> torch.Tensor:
    """The uniforms from which a Gaussian modality gets this initial noise."""
    return torch.special.ndtr(noise.double())


def everywhere(x: torch.Tensor) -> torch.Tensor:
    """A mask of x's shape in which all elements are observed."""
    return torch.ones_like(x, dtype=torch.bool)


def some(x: torch.Tensor) -> torch.Tensor:
    """A mask of x's shape in which every third element is observed."""
    return (torch.arange(x[0].numel()) % 3 == 0).view(x.shape[1:]).expand(x.shape)


class Spy:
    """A network that records its calls: (batch size, outputs, times)."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, x, t, mask=None, outputs=None):
        self.calls.append((len(x["image"]), list(outputs), t))
        return self.net(x, t, mask, outputs)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[m], b[m]) for m in a) and a.keys() == b.keys()


# Batching

CONDITIONS = {  # functions of the range of samples
    "joint": lambda rows: {},
    "text_to_image": lambda rows: {"text": texts(20)[rows]},
    "image_to_text": lambda rows: {"image": images(20)[rows]},
    "noisy_text": lambda rows: {"text": (texts(20)[rows], 0.5)},
    "from_time": lambda rows: {"image": Condition(images(20)[rows], 0.6, everywhere(images(20)[rows]))},
    "inpainting": lambda rows: {"image": Condition(images(20)[rows], mask=some(images(20)[rows]))},
    "infilling": lambda rows: {"text": Condition(texts(20)[rows], mask=some(texts(20)[rows]))},
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_samples_do_not_depend_on_ranks_and_counts(net, space, case):
    """Samples 0 … 19 in batches of 4; then 3 … 8 alone, and all 20 split over three uneven ranks."""
    conditions, options = CONDITIONS[case], {"steps": 5, "seed": 11, "batch_size": 4, "guidance": 2.0}
    whole = sample(net, space, conditions(slice(0, 20)), n=20, **options)
    part = sample(net, space, conditions(slice(3, 9)), n=6, start_index=3, **options)
    assert same(part, {m: x[3:9] for m, x in whole.items()})
    cuts = [(0, 7), (7, 14), (14, 20)]
    ranks = [sample(net, space, conditions(slice(a, b)), n=b - a, start_index=a, **options) for a, b in cuts]
    assert same({m: torch.cat([r[m] for r in ranks]) for m in space}, whole)


@pytest.mark.parametrize("methods", [("heun", "tau_leap"), ("euler_sde", "ancestral"), ("dpmpp_2m", "first_hitting")])
@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_another_batch_size_uses_the_same_random_numbers(net, space, methods, batch_size):
    """Rounding differs with the batch: images within 1e-4, at least 99.9% of the tokens equal."""
    options = {"n": 256 if batch_size != 1 else 48, "steps": 4, "seed": 3}
    samplers = {"image": Sampler(methods[0]), "text": Sampler(methods[1])}
    a = sample(net, space, batch_size=16, samplers=samplers, **options)
    b = sample(net, space, batch_size=batch_size, samplers=samplers, **options)
    assert (a["image"] - b["image"]).abs().max() < 1e-4
    assert (a["text"] == b["text"]).double().mean() >= 0.999


def test_samples_differ_from_each_other_and_between_seeds(net, space):
    """Other tests would pass with constant samples."""
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


# Evaluations of the network


@pytest.mark.parametrize(("method", "nfe"), [("heun", 9), ("euler", 5), ("euler_sde", 5), ("dpmpp_2m", 5)])
def test_number_of_evaluations_and_their_outputs(net, space, method, nfe):
    """2N − 1 evaluations with Heun, else N. Second evaluations predict images only; conditions are not predicted."""
    spy, samplers = Spy(net), {"image": Sampler(method)}
    sample(spy, space, n=2, steps=5, samplers=samplers)
    assert len(spy.calls) == nfe
    both = [outputs for _, outputs, _ in spy.calls if outputs == ["image", "text"]]
    assert len(both) == 5
    assert all(outputs == ["image"] for _, outputs, _ in spy.calls if outputs not in both)
    spy.calls.clear()
    sample(spy, space, {"text": texts(2)}, steps=5, samplers=samplers)
    assert [outputs for _, outputs, _ in spy.calls] == [["image"]] * nfe
    spy.calls.clear()
    sample(spy, space, {"image": images(2)}, steps=5, samplers=samplers)
    assert [outputs for _, outputs, _ in spy.calls] == [["text"]] * 5


def test_second_evaluation_of_heun_is_at_the_next_time_of_images_only(net, space):
    spy = Spy(net)
    sample(spy, space, n=2, steps=3, samplers={"image": Sampler(time_grid=torch.tensor([1.0, 0.6, 0.2, 0.0]))})
    image = [t["image"][0].item() for *_, t in spy.calls]
    sigma = space["image"].schedule.sigma(torch.tensor([1.0, 0.6, 0.6, 0.2, 0.2], dtype=torch.float64))
    assert image == pytest.approx(sigma.tolist(), rel=1e-6)
    # the text's grid is linspace(1, 1e-3, 3); its time stays the same in the second evaluation
    assert [t["text"][0].item() for *_, t in spy.calls] == pytest.approx([1.0, 1.0, 0.5005, 0.5005, 1e-3], rel=1e-6)


def test_no_evaluation_without_a_change(net, space):
    """None where the grid repeats a time, and none with first_hitting for a text in which every token is observed."""
    spy = Spy(net)
    repeats = {"text": Sampler(time_grid=torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0]))}
    sample(spy, space, {"image": images(2)}, steps=4, samplers=repeats)
    assert len(spy.calls) == 2
    spy.calls.clear()
    condition = Condition(texts(2), mask=everywhere(texts(2)))
    samplers = {"image": Sampler("euler"), "text": Sampler("first_hitting")}
    out = sample(spy, space, {"text": condition}, steps=4, samplers=samplers)
    assert [outputs for _, outputs, _ in spy.calls] == [["image"]] * 4
    assert torch.equal(out["text"], texts(2))


def test_first_hitting_evaluates_once_per_token(net, space):
    spy = Spy(net)
    samplers = {"image": Sampler("euler"), "text": Sampler("first_hitting")}
    sample(spy, space, n=1, steps=12, samplers=samplers)
    assert len(spy.calls) == 12
    assert sum("text" in outputs for _, outputs, _ in spy.calls) == LENGTH
    spy.calls.clear()
    sample(spy, space, {"image": images(1)}, steps=12, samplers=samplers)
    assert len(spy.calls) == LENGTH
    spy.calls.clear()
    observed = some(texts(1))
    sample(spy, space, {"image": images(1), "text": Condition(texts(1), mask=observed)}, steps=12, samplers=samplers)
    assert len(spy.calls) == int((~observed).sum())


class PartialSpy:
    """A network with partial outputs that records the positions of text whose logits are computed."""

    partial_outputs = True

    def __init__(self, net):
        self.net, self.positions = net, []

    def __call__(self, x, t, mask=None, outputs=None, positions=None):
        if "text" in outputs:
            self.positions += positions["text"].tolist()
        return self.net(x, t, mask, outputs, positions=positions)


@pytest.mark.parametrize("single_stream_depth", [0, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("conditional", [False, True])
def test_logits_are_computed_only_at_positions_that_change(space, single_stream_depth, guidance, conditional):
    """The same samples as with full outputs; first_hitting computes the logits of each position once per branch."""
    net, n = noisy_net(single_stream_depth), 7

    def full(x, t, mask=None, outputs=None):
        return net(x, t, mask, list(outputs))

    spy, conditions = PartialSpy(net), {"image": images(n)} if conditional else {}
    options = {"steps": 4, "n": n, "seed": 5, "guidance": guidance, "samplers": {"text": Sampler("first_hitting")}}
    drawn, expected = (sample(f, space, conditions, **options) for f in (spy, full))
    assert torch.equal(drawn["text"], expected["text"])
    torch.testing.assert_close(drawn["image"], expected["image"], rtol=1e-4, atol=1e-4)
    branches = 2 if conditional and guidance != 1.0 else 1  # in joint sampling the text is not guided
    assert sorted(spy.positions) == list(range(branches * n * LENGTH))


# Trajectories, initial noise, ends


def test_trajectory_goes_from_noise_to_the_samples(net, space):
    out, states = sample(net, space, n=5, steps=4, batch_size=2, start_index=3, trajectory=True)
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
        lambda *a, outputs, **k: {m: zero[m] for m in outputs}, space, n=512, batch_size=512, steps=1, trajectory=True
    )
    x = states[0]["image"]
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / x.numel())


def test_uniforms_replace_the_noise_of_the_prior(net, space):
    noise = images(6)
    uniforms = {"image": uniforms_of(noise)}
    out, states = sample(net, space, n=6, steps=3, batch_size=4, uniforms=uniforms, trajectory=True)
    torch.testing.assert_close(states[0]["image"], noise, rtol=1e-6, atol=1e-6)
    other = sample(net, space, n=6, steps=3, batch_size=4)
    assert not torch.equal(out["image"], other["image"])


def test_uniforms_replace_the_noise_of_uniform_diffusion(net):
    """States at time 1 are ⌊u K⌋."""
    u = torch.rand(6, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, states = sample(net, space_of(Uniform), n=6, steps=2, uniforms={"text": u}, trajectory=True)
    assert torch.equal(states[0]["text"], (u * STATES).long())


def test_conditions_are_returned_at_their_noise_time(net, space):
    clean = sample(net, space, {"text": texts(4)}, steps=2)
    assert torch.equal(clean["text"], texts(4))
    seen = []

    def spy(x, t, mask=None, outputs=None):
        seen.append(x["text"])
        return net(x, t, mask, outputs)

    noisy = sample(spy, space, {"text": (texts(4), 0.5)}, steps=2)["text"]
    assert all(torch.equal(noisy, tokens) for tokens in seen)
    masked = noisy == STATES
    assert 0 < int(masked.sum()) < masked.numel()
    assert torch.equal(noisy[~masked], texts(4)[~masked])


def test_last_sde_update_adds_no_noise(net, space):
    options = {"samplers": {"image": Sampler("euler_sde")}, "uniforms": {"image": uniforms_of(images(4))}}
    a, b = (sample(net, space, {"text": texts(4)}, steps=1, seed=seed, **options) for seed in (0, 1))
    assert torch.equal(a["image"], b["image"])
    a, b = (sample(net, space, {"text": texts(4)}, steps=2, seed=seed, **options) for seed in (0, 1))
    assert not torch.equal(a["image"], b["image"])


@pytest.mark.parametrize("process", [Masked, Uniform])
def test_one_step_and_every_sampler_ends_in_valid_data(net, process):
    space = space_of(process)
    for image in SAMPLERS[Gaussian]:
        for text in SAMPLERS[process]:
            for steps in (1, 2, 9):
                out = sample(net, space, n=3, steps=steps, samplers={"image": Sampler(image), "text": Sampler(text)})
                space.check(out)
                assert bool(out["image"].isfinite().all()), (image, text, steps)


@pytest.mark.parametrize("method", [*SAMPLERS[Gaussian], *SAMPLERS[Masked]])
def test_explicit_times_equal_the_named_grid(net, space, method):
    """Every sampler takes the times themselves."""
    m = "image" if method in SAMPLERS[Gaussian] and method != "euler" else "text"
    times = torch.cat([torch.linspace(1.0, 1e-3, 4, dtype=torch.float64), torch.zeros(1)])
    named, explicit = (sample(net, space, n=4, steps=4, samplers={m: Sampler(method, g)}) for g in ("linear", times))
    assert same(named, explicit)


class ModeSpy(torch.nn.Module):
    """A network that records whether it is in training mode, and can be made to fail."""

    def __init__(self, net):
        super().__init__()
        self.inner, self.modes, self.fails = net, [], False

    def forward(self, *args, **kwargs):
        self.modes.append(self.training)
        if self.fails:
            raise RuntimeError("evaluation failed")
        return self.inner(*args, **kwargs)


def test_training_mode_of_the_network_is_restored(net, space):
    spy = ModeSpy(net).train()
    spy.inner.eval()  # a part that is frozen stays in evaluation mode
    sample(spy, space, n=1, steps=2)
    assert spy.training
    assert not spy.inner.training
    assert spy.modes == [False] * 3
    spy.fails = True
    with pytest.raises(RuntimeError, match="evaluation failed"):
        sample(spy, space, steps=2)
    assert spy.training
    spy.fails = False
    spy.eval()
    sample(spy, space, n=1, steps=1)
    assert not spy.training


def test_double_precision_images_become_single_precision(net, space):
    x = images(3)
    assert same(sample(net, space, {"image": x.double()}, steps=2), sample(net, space, {"image": x}, steps=2))


def test_no_gradients_are_recorded(net, space):
    assert not sample(net, space, n=1, steps=1)["image"].requires_grad


def test_default_number_of_samples(net, space):
    assert len(sample(net, space, steps=1)["text"]) == 1
    assert len(sample(net, space, {"text": texts(3)}, steps=1)["image"]) == 3


# Bad input

TWO = {"text": texts(2)}


def with_mask(mask: torch.Tensor, tokens: torch.Tensor | None = None) -> dict:
    return {"conditions": {"text": Condition(texts(2) if tokens is None else tokens, mask=mask)}}


def image_times(*times: float) -> dict:
    return {"samplers": {"image": Sampler(time_grid=torch.tensor(times))}}


OBSERVED = some(texts(2))
ALLOWED = torch.ones(LENGTH, STATES, dtype=torch.bool)
BAD = {
    "unknown modality": ({"conditions": {"sound": texts(2)}}, "unknown modality 'sound'.*image, text"),
    "unknown modality, mask": (
        {"conditions": {"sound": Condition(texts(2), mask=OBSERVED)}},
        "unknown modality 'sound'",
    ),
    "all conditions": ({"conditions": {**TWO, "image": images(2)}}, "nothing to generate"),
    "another n": ({"conditions": TWO, "n": 3}, "text: 2 conditions for n = 3"),
    "two numbers": ({"conditions": {**TWO, "image": Condition(images(3), 0.5)}}, "image: 3 conditions for n = 2"),
    "no samples": ({"n": 0}, "n must be at least 1"),
    "no steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "negative steps": ({"steps": -3}, "steps must be at least 1, got -3"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1"),
    "negative start": ({"start_index": -1}, "start_index must be at least 0"),
    "time above 1": ({"conditions": {"text": (texts(2), 1.5)}}, r"text: the time .* must lie in \[0, 1\], got 1.5"),
    "time below 0": ({"conditions": {"text": (texts(2), -0.1)}}, "text: the time of a condition"),
    "time not a number": ({"conditions": {"text": (texts(2), math.nan)}}, "text: the time of a condition"),
    "time above 1, mask": (
        {"conditions": {"text": Condition(texts(2), 1.5, OBSERVED)}},
        "text: the time of a condition",
    ),
    "wrong length": ({"conditions": {"text": texts(2)[:, :3]}}, r"text: expected samples of shape \(6,\), got \(3,\)"),
    "wrong length, mask": (with_mask(OBSERVED[:, :3], texts(2)[:, :3]), "text: expected samples of shape"),
    "mask of another shape": (with_mask(OBSERVED[:, :3]), r"text: a mask of shape \(2, 3\) does not fit .* \(2, 6\)"),
    "mask of numbers": (with_mask(OBSERVED.float()), "text: the mask of a condition must be bool, got torch.float32"),
    "mask token as data": ({"conditions": {"text": texts(2) + 1}}, r"text: tokens must lie in \[0, 5\)"),
    "mask token as observed": (
        with_mask(OBSERVED, torch.full_like(texts(2), STATES)),
        r"text: tokens must lie in \[0, 5\)",
    ),
    "tokens as numbers": ({"conditions": {"text": texts(2).float()}}, "text: expected int64"),
    "image of another size": ({"conditions": {"image": torch.zeros(2, 1, 5, 5)}}, "image: expected samples of shape"),
    "guidance without a condition": ({"guidance": 2.0, "space": "image only"}, "guidance needs a condition"),
    "sampler of another process": ({"samplers": {"image": Sampler("tau_leap")}}, "image: sampler must be one of heun"),
    "unknown sampler": ({"samplers": {"text": Sampler("magic")}}, "text: sampler must be one of tau_leap.*'magic'"),
    "sampler of no modality": ({"samplers": {"sound": Sampler()}}, "samplers: unknown modality 'sound'"),
    "unknown grid": ({"samplers": {"text": Sampler(time_grid="log")}}, "time_grid must be one of"),
    "Gaussian grid": ({"samplers": {"text": Sampler(time_grid="logsnr")}}, "time_grid logsnr is for Gaussian"),
    "short grid": (image_times(1.0, 0.0), "a time grid of 2 steps needs 3 times"),
    "rising grid": (image_times(0.5, 1.0, 0.0), "falling from 1 to 0"),
    "unfinished grid": (image_times(1.0, 0.5, 0.1), "falling from 1 to 0"),
    "late grid": (image_times(0.7, 0.5, 0.0), "falling from 1 to 0"),
    "grid of nan": (image_times(1.0, math.nan, 0.0), "falling from 1 to 0"),
    "uniforms of no modality": ({"uniforms": {"sound": images(1)}}, "uniforms: unknown modality 'sound'"),
    "uniforms of another n": (
        {"uniforms": {"image": images(2)}, "n": 3},
        r"uniforms: image needs shape \(3, 1, 4, 4\)",
    ),
    "uniforms of another shape": (
        {"uniforms": {"text": torch.zeros(1, 99)}},
        r"text needs shape \(1, 6\), got \(1, 99\)",
    ),
    "allowed states of no modality": ({"allowed_states": {"sound": ALLOWED}}, "allowed_states: unknown modality"),
    "allowed states of images": ({"allowed_states": {"image": ALLOWED}}, "image is not a discrete modality"),
    "allowed states of another shape": (
        {"allowed_states": {"text": ALLOWED[:3]}},
        r"text needs bool of shape \(6, 5\)",
    ),
    "allowed states as numbers": ({"allowed_states": {"text": ALLOWED.long()}}, "text needs bool"),
    "nothing allowed": ({"allowed_states": {"text": ~ALLOWED}}, "at least one allowed state at every position"),
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


def test_length_of_algorithm_5():
    """The constructor, the loop and the update of `Run` have at most 60 lines together."""
    tree = ast.parse(inspect.getsource(Run))
    methods = {node.name: node for node in tree.body[0].body if isinstance(node, ast.FunctionDef)}
    lines = [methods[name].end_lineno - methods[name].lineno + 1 for name in ("__init__", "states", "update")]
    assert sum(lines) <= 60
