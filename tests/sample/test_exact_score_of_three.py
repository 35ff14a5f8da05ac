"""Three modalities with the exact score: every part given any other follows its exact conditional distribution.

Two Gaussian modalities and a discrete one, all correlated. Every test of a distribution is a χ² test, a
Kolmogorov–Smirnov test or the largest of several z-scores, and fails a correct sampler for 1 seed in 10,000
(`fits.alarm`).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from anystate.diffusion import Gaussian, Linear, LogLinear, Masked, Space, Uniform
from anystate.sample import Condition, Sampler, sample

N = 3000
NAMES = ("place", "size", "text")
GIVEN = [given for k in (1, 2) for given in itertools.combinations(NAMES, k)]  # the six proper subsets
COORDINATES = {"place": [0, 1], "size": [2]}


class Three:
    """text: two correlated tokens of three states; place, two numbers, and size, one number: N(mean, cov) together.

    Mean (3,) and covariance (3, 3) depend on the whole text, and the covariance is not diagonal: place and size depend
    on each other also when the text is known. Everything is computed in float64 by enumerating the S = 9 texts.
    """

    states, length = 3, 2

    def __init__(self, process: type = Masked, t_min: float = 1e-5, delta: float = 1e-5):
        rng = torch.Generator().manual_seed(7)
        self.process = process
        self.texts = torch.tensor(list(itertools.product(range(self.states), repeat=self.length)))  # (S, L)
        size = len(self.texts)
        agree = (self.texts[:, 0] == self.texts[:, 1]).double()
        self.prob = torch.softmax(1.5 * agree + 0.5 * torch.randn(size, generator=rng, dtype=torch.float64), 0)
        self.mean = 1.2 * torch.randn(size, 3, generator=rng, dtype=torch.float64)
        mix = torch.randn(size, 3, 3, generator=rng, dtype=torch.float64)
        self.cov = 0.15 * mix @ mix.transpose(1, 2) + 0.05 * torch.eye(3, dtype=torch.float64)
        self.space = Space(
            {
                "place": Gaussian((2,), Linear(), t_min, time_conditioning="time"),
                "size": Gaussian((1,), Linear(), t_min, time_conditioning="time"),
                "text": process(self.length, self.states, LogLinear(delta), t_min),
            }
        )

    def noisy(self, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean (S, D) and covariance (S, D, D), given each text, of the modalities in t at their times."""
        names = [m for m in COORDINATES if m in t]
        at = [c for m in names for c in COORDINATES[m]]
        alpha, sigma = (torch.stack([f(m, t) for m in names for _ in COORDINATES[m]]) for f in (self.alpha, self.sigma))
        cov = self.cov[:, at][:, :, at] * (alpha[:, None] * alpha)
        return alpha * self.mean[:, at], cov + torch.diag(sigma**2)

    def alpha(self, m: str, t: dict[str, Tensor]) -> Tensor:
        return self.space[m].schedule.alpha(the_time(t[m]))

    def sigma(self, m: str, t: dict[str, Tensor]) -> Tensor:
        return self.space[m].schedule.sigma(the_time(t[m]))

    def posterior(self, x: dict[str, Tensor], t: dict[str, Tensor]) -> Tensor:
        """(B, S): probability of each clean text given the noisy modalities in x."""
        log_p = torch.log(self.prob)[None]
        if numbers := [m for m in COORDINATES if m in x]:
            mean, cov = self.noisy({m: t[m] for m in numbers})
            away = torch.cat([x[m].double() for m in numbers], 1)[:, None] - mean
            square = torch.einsum("bsc,scd,bsd->bs", away, torch.linalg.inv(cov), away)
            log_p = log_p - 0.5 * (square + torch.logdet(cov))
        if "text" in x:
            log_p = log_p + self.text_likelihood(x["text"], t["text"]).log()
        return torch.softmax(log_p, -1)

    def text_likelihood(self, tokens: Tensor, t: Tensor) -> Tensor:
        """(B, S): q_t(tokens | clean text), up to a factor of the row."""
        same = (tokens[:, None] == self.texts).double()
        if self.process is Masked:
            return torch.where(tokens[:, None] == self.states, 1.0, same).prod(-1)
        kept = 1.0 - (1.0 - self.space["text"].schedule.delta) * t.double()[:, None, None]
        return (kept * same + (1.0 - kept) / self.states).prod(-1)

    def net(self, x, t, mask=None, outputs=None):
        posterior, out = self.posterior(x, t), {}
        mean, cov = self.noisy(t)
        away = torch.cat([x[m].double() for m in COORDINATES], 1)[:, None] - mean
        score = -torch.einsum("bs,scd,bsd->bc", posterior, torch.linalg.inv(cov), away)
        for m in self.space if outputs is None else outputs:
            if m in COORDINATES:
                out[m] = -self.sigma(m, t) * score[:, COORDINATES[m]]
            else:
                one_hot = torch.nn.functional.one_hot(self.texts, self.states).double()
                out[m] = torch.einsum("bs,slk->blk", posterior, one_hot).clamp(min=1e-30).log()
        return out

    def draw(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Samples of the true joint distribution."""
        rng = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(self.prob, n, replacement=True, generator=rng)
        noise = torch.randn(n, 3, 1, generator=rng, dtype=torch.float64)
        numbers = (self.mean[rows] + (torch.linalg.cholesky(self.cov)[rows] @ noise)[..., 0]).float()
        return {"place": numbers[:, :2], "size": numbers[:, 2:], "text": self.texts[rows]}

    def index(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] * self.states + tokens[:, 1]

    def one_hot(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.index(tokens), len(self.texts)).double()

    def residuals(self, x: dict[str, Tensor], given: dict[str, Tensor], times: dict[str, Tensor]) -> Tensor:
        """Independent standard normals if the numbers that are not given follow their distribution given the text and
        `given` at its noise times: each number, less its mean given those before it, over its standard deviation."""
        order = sorted(COORDINATES, key=lambda m: m not in given)
        t = {m: times.get(m, torch.zeros(len(x["text"]))) for m in COORDINATES}
        mean, cov = self.noisy(t)
        rows, at = self.index(x["text"]), [c for m in order for c in COORDINATES[m]]
        mean, cov = mean[rows][:, at], cov[rows][:, at][:, :, at]
        away = torch.cat([x[m].double() for m in COORDINATES], 1)[:, at] - mean
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), away[..., None], upper=False)[..., 0]
        known = sum(len(COORDINATES[m]) for m in COORDINATES if m in given)
        return whitened[:, known:].flatten()


def the_time(t: Tensor) -> Tensor:
    """The time, (), of a batch whose samples have the same one."""
    assert bool((t == t[0]).all())
    return t[0].double()


@pytest.fixture(scope="module")
def three() -> Three:
    return Three()


def follows(fits, space: Three, x: dict[str, Tensor], given: dict[str, Tensor], times: dict | None = None) -> bool:
    """Whether what is not given follows its exact joint distribution given the rest: the text given the condition,
    then the numbers given text and condition."""
    n, right = len(x["text"]), []
    times = {m: torch.full((n,), (times or {}).get(m, 0.0)) for m in given}
    if "text" not in given:
        right.append(calibrated(fits, space.one_hot(x["text"]), space.posterior(given, times)))
    if set(COORDINATES) - set(given):
        right.append(fits.normal(space.residuals(x, given, times)))
    return all(right)


def calibrated(fits, texts: Tensor, prob: Tensor) -> bool:
    """`fits.calibrated`, and as many of each text as expected among the samples weighted by every probability: a
    z-score for each pair of texts that is well approximated by a normal distribution."""
    weights = prob.T  # (S, B)
    variance = weights.square() @ (prob * (1.0 - prob))
    z = (weights @ (texts - prob))[variance > 25] / variance[variance > 25].sqrt()
    return fits.calibrated(texts, prob) and bool(z.abs().max() < norm.isf(fits.alarm / 2 / len(z)))


def draw(space: Three, conditions: dict, steps: int = 64, seed: int = 0, **samplers: str) -> dict[str, Tensor]:
    methods = {m: Sampler(method) for m, method in samplers.items()}
    return sample(space.net, space.space, conditions, n=N, batch_size=N, steps=steps, seed=seed, samplers=methods)


def given_parts(space: Three, given, seed: int = 0) -> dict[str, Tensor]:
    truth = space.draw(N, seed)
    return {m: truth[m] for m in given}


def test_the_toy_score_is_the_gradient_of_its_log_density(three):
    """By automatic differentiation, at times that differ."""
    x, t = three.draw(20), {m: torch.full((20,), v).double() for m, v in zip(NAMES, (0.3, 0.6, 0.5), strict=True)}
    numbers = torch.cat([x["place"], x["size"]], 1).double().requires_grad_()
    x["text"][::2, 1] = three.states
    mean, cov = three.noisy(t)
    density = torch.distributions.MultivariateNormal(mean, cov).log_prob(numbers[:, None])
    density = density + three.text_likelihood(x["text"], t["text"]).log() + three.prob.log()
    (score,) = torch.autograd.grad(torch.logsumexp(density, 1).sum(), numbers)
    out = three.net(x, t)
    for m, at in COORDINATES.items():
        torch.testing.assert_close(out[m], -three.sigma(m, t) * score[:, at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", ["ancestral", "tau_leap", "first_hitting"])
def test_all_three_together(three, fits, text):
    x = draw(three, {}, steps=96, text=text)
    assert fits.counts(three.one_hot(x["text"]).sum(0), three.prob)
    assert fits.normal(three.residuals(x, {}, {}))


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_the_rest_given_any_part(three, fits, given):
    """The six conditional directions: what is given comes back as it was, the rest follows its conditional law."""
    conditions = given_parts(three, given)
    x = draw(three, conditions, text="ancestral")
    assert all(torch.equal(x[m], value) for m, value in conditions.items())
    assert follows(fits, three, x, conditions)
    shuffled = {m: value.roll(1, 0) for m, value in conditions.items()}
    assert not follows(fits, three, {**x, **shuffled}, shuffled), "the test must notice another condition"


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
def test_too_few_steps_are_noticed(three, fits, given):
    """The tests above can fail: with two steps every direction is measurably wrong."""
    conditions = given_parts(three, given)
    assert not follows(fits, three, draw(three, conditions, steps=2, text="ancestral"), conditions)


@pytest.mark.parametrize("given", [("place",), ("size", "text")], ids="+".join)
@pytest.mark.parametrize("numbers", ["dpmpp_2m", "euler_sde"])
def test_other_samplers_and_uniform_text(fits, given, numbers):
    """Text under uniform diffusion."""
    three = Three(Uniform, t_min=1e-3, delta=1e-3)
    conditions = given_parts(three, given)
    grids = {"dpmpp_2m": Sampler("dpmpp_2m", "logsnr"), "euler_sde": Sampler("euler_sde")}
    samplers = dict.fromkeys(COORDINATES, grids[numbers]) | {"text": Sampler("tau_leap")}
    x = sample(three.net, three.space, conditions, n=N, batch_size=N, steps=128, samplers=samplers)
    assert follows(fits, three, x, conditions)


def test_conditions_at_two_noise_times(three, fits):
    """Size noised to time 0.3 and text masked to time 0.5: place follows its law given both as they are."""
    truth, times = three.draw(N), {"size": 0.3, "text": 0.5}
    x = draw(three, {m: (truth[m], t) for m, t in times.items()})
    given = {m: x[m] for m in times}
    assert not torch.equal(x["size"], truth["size"])
    assert 0.4 < (x["text"] == three.states).double().mean() < 0.6
    at = {m: torch.full((N,), t) for m, t in times.items()}
    posterior = three.posterior(given, at)
    mean, cov = three.noisy({"place": torch.zeros(N), "size": at["size"]})  # (S, 3) and (S, 3, 3)
    gain = cov[:, :2, 2] / cov[:, 2, 2:]
    centre = mean[:, :2] + gain * (given["size"].double()[:, None] - mean[:, 2:])  # (N, S, 2)
    spread = (cov[:, [0, 1], [0, 1]] - gain * cov[:, :2, 2]).sqrt()
    z = (x["place"].double()[:, None] - centre) / spread
    for c in range(2):  # the coordinates of a sample are correlated, so each is tested alone
        mixed = (posterior * torch.special.ndtr(z[..., c])).sum(1)
        assert fits.normal(torch.special.ndtri(mixed.clamp(1e-12, 1 - 1e-12)))


def test_a_known_token_and_the_size(three, fits):
    """The first token and the size are known, the second token and the place are sampled: exact for masked text."""
    truth = three.draw(N)
    mask = torch.tensor([[True, False]]).expand(N, 2)
    x = draw(three, {"text": Condition(truth["text"], mask=mask), "size": truth["size"]}, text="ancestral")
    assert torch.equal(x["text"][:, 0], truth["text"][:, 0])
    half_known = torch.where(mask, truth["text"], three.states)
    zero = torch.zeros(N)
    posterior = three.posterior({"size": truth["size"], "text": half_known}, {"size": zero, "text": zero + 0.5})
    assert calibrated(fits, three.one_hot(x["text"]), posterior)
    assert fits.normal(three.residuals(x, {"size": truth["size"]}, {}))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"sound": torch.zeros(2, 1)}, "unknown modality 'sound'; this space has place, size, text"),
        (
            {"sound": Condition(torch.zeros(2, 1), mask=torch.ones(2, 1, dtype=torch.bool))},
            "unknown modality 'sound'; this space has place, size, text",
        ),
        ({"size": torch.zeros(2, 2)}, r"size: expected samples of shape \(1,\), got \(2,\)"),
        (
            {"place": Condition(torch.zeros(2, 2), mask=torch.ones(2, 3, dtype=torch.bool))},
            r"place: a mask of shape \(2, 3\) does not fit data of shape \(2, 2\)",
        ),
        ({"place": Condition(torch.zeros(2, 2), mask=torch.ones(2, 2))}, "place: the mask of a condition must be bool"),
        ({"place": torch.zeros(2, 2), "size": torch.zeros(3, 1)}, "size: 3 conditions for n = 2 samples"),
    ],
)
def test_conditions_that_do_not_fit(three, conditions, message):
    """One line that names the modality and what is wrong."""
    with pytest.raises(ValueError, match=message) as error:
        sample(three.net, three.space, conditions, steps=2)
    assert "\n" not in str(error.value)


def test_errors_fall_with_the_steps(three):
    """Total variation distance of the texts, given size, from their law: 10,000 samples, noise 0.011 ± 0.003."""
    n, errors = 10_000, []
    size = three.draw(n)["size"]
    law = three.posterior({"size": size}, {"size": torch.zeros(n)}).mean(0)
    for steps in (4, 16, 64):
        x = sample(three.net, three.space, {"size": size}, n=n, batch_size=n, steps=steps)
        errors.append(0.5 * (three.one_hot(x["text"]).mean(0) - law).abs().sum().item())
    assert errors[0] > 2 * errors[1], errors
    assert errors[1] > errors[2], errors
    assert errors[2] < 0.022, errors
