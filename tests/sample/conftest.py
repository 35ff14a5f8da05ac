"""A toy space whose joint score is known in closed form, goodness-of-fit tests, and a model of four modalities."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from anystate.configs.load import parse_config
from anystate.diffusion import Gaussian, Linear, LogLinear, Masked, Space
from anystate.train.data.dataset import InMemory
from anystate.train.trainer import Trainer


class Call(NamedTuple):
    """One evaluation of a network."""

    x: dict[str, Tensor]
    t: dict[str, Tensor]
    outputs: list[str]

    @property
    def batch(self) -> int:
        return len(next(iter(self.x.values())))


class Toy:
    """text: `length` correlated tokens of 3 states; image: 2 numbers, N(mean, std² I) that depend on the whole text.

    Everything is computed in float64 by enumerating the S = 3^length texts. `net` is the exact network; it records its
    evaluations in `calls`.
    """

    states = 3

    def __init__(self, length: int = 2, process: type = Masked, t_min: float = 1e-5, delta: float = 1e-5):
        self.length, self.process = length, process
        self.texts = torch.tensor(list(itertools.product(range(self.states), repeat=length)))  # (S, L)
        rng = torch.Generator().manual_seed(4)
        size = len(self.texts)
        agree = (self.texts == self.texts[:, :1]).double().mean(1)  # equal tokens are more probable
        self.prob = torch.softmax(3.0 * agree + 0.5 * torch.randn(size, generator=rng, dtype=torch.float64), 0)
        self.mean = 1.5 * torch.randn(size, 2, generator=rng, dtype=torch.float64)
        self.std = 0.4 + 0.4 * torch.rand(size, generator=rng, dtype=torch.float64)
        self.space = Space(
            {
                "image": Gaussian((2,), Linear(), t_min, time_conditioning="time"),
                "text": process(length, self.states, LogLinear(delta), t_min),
            }
        )
        self.calls: list[Call] = []

    def text_only(self) -> Space:
        return Space({"text": self.space["text"]})

    def posterior(self, x: dict[str, Tensor], t: dict[str, Tensor]) -> Tensor:
        """(B, S): probability of each clean text given the noisy image, the noisy text or both."""
        log_p = torch.log(self.prob)[None]
        if "image" in x:
            alpha, sigma = self.alpha_sigma(t["image"])
            var = (alpha[:, None] * self.std) ** 2 + sigma[:, None] ** 2  # (B, S)
            away = x["image"].double()[:, None] - alpha[:, None, None] * self.mean
            log_p = log_p - 0.5 * away.square().sum(-1) / var - torch.log(var)
        if "text" in x:
            log_p = log_p + self.text_likelihood(x["text"], t["text"]).log()
        return torch.softmax(log_p, -1)

    def text_likelihood(self, tokens: Tensor, t: Tensor) -> Tensor:
        """(B, S): q_t(tokens | clean text), up to a factor of the row."""
        same = (tokens[:, None] == self.texts).double()  # (B, S, L)
        if self.process is Masked:
            return torch.where(tokens[:, None] == self.states, 1.0, same).prod(-1)
        kept = 1.0 - (1.0 - self.space["text"].schedule.delta) * t.double()[:, None, None]
        return (kept * same + (1.0 - kept) / self.states).prod(-1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        schedule = self.space["image"].schedule
        return schedule.alpha(t.double()), schedule.sigma(t.double())

    def score(self, x: dict[str, Tensor], t: dict[str, Tensor]) -> Tensor:
        """(B, 2): gradient in the image of the log density of the noisy pair."""
        alpha, sigma = self.alpha_sigma(t["image"])
        var = (alpha[:, None] * self.std) ** 2 + sigma[:, None] ** 2
        away = x["image"].double()[:, None] - alpha[:, None, None] * self.mean
        return -(self.posterior(x, t)[..., None] * away / var[..., None]).sum(1)

    def token_probs(self, posterior: Tensor) -> Tensor:
        """(B, L, K) marginals of each token from (B, S)."""
        one_hot = torch.nn.functional.one_hot(self.texts, self.states).double()  # (S, L, K)
        return torch.einsum("bs,slk->blk", posterior, one_hot)

    def net(self, x, t, mask=None, outputs=None):
        outputs = list(x) if outputs is None else list(outputs)
        self.calls.append(Call(dict(x), dict(t), outputs))
        predictions = {}
        if "image" in outputs:
            predictions["image"] = -self.alpha_sigma(t["image"])[1][:, None] * self.score(x, t)
        if "text" in outputs:
            predictions["text"] = torch.log(self.token_probs(self.posterior(x, t)).clamp(min=1e-30))
        return predictions

    def draw(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Samples of the true joint distribution."""
        rng = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(self.prob, n, replacement=True, generator=rng)
        noise = torch.randn(n, 2, generator=rng, dtype=torch.float64)
        return {"image": (self.mean[rows] + self.std[rows, None] * noise).float(), "text": self.texts[rows]}

    def index(self, tokens: Tensor) -> Tensor:
        """(B,) index in `texts` of each text."""
        return (tokens * self.states ** torch.arange(self.length - 1, -1, -1)).sum(1)

    def counts(self, tokens: Tensor) -> Tensor:
        return torch.bincount(self.index(tokens), minlength=len(self.texts)).double()

    def standardized(self, pairs: dict[str, Tensor]) -> Tensor:
        """(2 B,): (image − mean of its text) / std of its text; standard normal if the images are right."""
        rows = self.index(pairs["text"])
        return ((pairs["image"].double() - self.mean[rows]) / self.std[rows, None]).flatten()


@pytest.fixture
def toy() -> Toy:
    """Two correlated masked tokens and an image."""
    return Toy()


@pytest.fixture
def make_toy() -> type[Toy]:
    return Toy


@dataclasses.dataclass(frozen=True)
class GoodnessOfFit:
    """Statistical tests. Samples of the right distribution fail one with probability `alarm`, over seeds."""

    alarm: float = 1e-4

    def counts(self, observed: Tensor, prob: Tensor) -> bool:
        """χ² of counts against probabilities."""
        from scipy.stats import chisquare

        return bool(chisquare(observed.numpy(), (observed.sum() * prob / prob.sum()).numpy()).pvalue > self.alarm)

    def normal(self, values: Tensor) -> bool:
        """Kolmogorov–Smirnov against the standard normal distribution."""
        from scipy.stats import kstest

        return bool(kstest(values.numpy(), "norm").pvalue > self.alarm)

    def calibrated(self, tokens: Tensor, prob: Tensor) -> bool:
        """Whether texts, one-hot (B, S), are samples of their own distributions prob (B, S): a z-score per text.

        A text that is (almost) impossible for every sample must not occur.
        """
        from scipy.stats import norm

        variance = (prob * (1.0 - prob)).sum(0)
        possible = variance > 1e-6
        z = (tokens - prob).sum(0)[possible] / variance[possible].sqrt()
        return bool(z.abs().max() < norm.isf(self.alarm / 2 / len(z))) and not bool(tokens[:, ~possible].any())


@pytest.fixture
def fits() -> GoodnessOfFit:
    return GoodnessOfFit()


def mixed_config(**changes):
    """The config of a small model of an image, a label, a series and the columns of a table; changes: of modalities."""
    patches, v = {"width": 16, "patch": 4}, {"prediction_type": "v_prediction"}
    modalities = {
        "image": {"kind": "image", "channels": 1, "size": 8, "stream": patches, **v},
        "label": {"kind": "label", "stream": {"width": 16}},
        "sound": {"kind": "series", "channels": 2, "length": 16, "stream": patches, **v},
        "row": {"kind": "columns", "conditioning_prob": 0.25, "numerical": v, "stream": {"width": 16}},
    }
    settings = {
        "name": "mixed",
        "modalities": {m: {**section, **changes.get(m, {})} for m, section in modalities.items()},
        "network": {"depth": 1, "heads": 2, "head_dim": 8},
        "train": {"steps": 1, "batch": 8},
        "sample": {"steps": 3, "batch_size": 8},
    }
    return parse_config(settings, "test")


def mixed_data(n: int, seed: int = 0) -> InMemory:
    """n random examples of it."""
    rng = np.random.default_rng(seed)
    columns = {"age": rng.integers(18, 90, n), "sex": rng.choice(["Female", "Male"], n), "income": rng.normal(30, 9, n)}
    return InMemory(
        {
            "image": rng.integers(0, 256, (n, 8, 8)).astype(np.uint8),
            "label": [f"class {i % 3}" for i in range(n)],
            "sound": rng.normal(size=(n, 2, 16)).cumsum(-1),
            "row": pd.DataFrame(columns).round(2),
        }
    )


def randomized(trainer: Trainer) -> Trainer:
    """The trainer with random weights, saved; heads are zero in a new network."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for net in (trainer.state.net, trainer.state.ema):
            for p in net.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    trainer.save()
    return trainer


@pytest.fixture(scope="session")
def make_mixed(tmp_path_factory):
    """make_mixed(label={…}) → the run folder of an untrained model of four modalities, see `mixed_config`."""

    def make(**changes):
        out = tmp_path_factory.mktemp("mixed")
        config = mixed_config(**changes)
        randomized(Trainer(config, out, "cpu", data=(mixed_data(64), mixed_data(16, 1)), quiet=True))
        return out

    return make


@pytest.fixture(scope="session")
def mixed(make_mixed):
    return make_mixed()
