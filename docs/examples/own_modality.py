"""A state space, a data set and a config of one's own: sounds of a small synthesizer, as a wave, a label and a text.

    python own_modality.py            trains for some minutes on two CPU cores, samples every direction

Nothing in the package knows of this file. `docs/own-modality.md` explains it.
"""

import json
import sys

import numpy as np
import torch
from pydantic import Field

from anystate import Codec, GaussianModality, InMemory, Pipeline, Trainer, parse_config
from anystate.model.modalities.series import plot_lines
from anystate.model.streams import Features

FORMS = ("sine", "square", "sawtooth", "triangle")
SPEEDS = {"slow": 1, "medium": 2, "fast": 4}  # periods in a wave
STEPS = 48


class LoudnessCodec(Codec):
    """Waves ↔ float32 (N, length): on the logarithmic scale of loudness (mu-law, in [−1, 1]), the state space."""

    def __init__(self, length: int, mu: float, files):
        self.length, self.mu = length, mu
        self.limit = json.loads(files["limit.json"]) if "limit.json" in files else None

    @property
    def is_fitted(self):
        return self.limit is not None

    def fit(self, values, seed=0):
        self.limit = float(np.abs(np.stack(values)).max())

    def encode(self, values):
        if any(len(wave) != self.length for wave in values):
            raise ValueError(f"a wave has {self.length} samples")
        x = np.stack(values) / self.limit
        return torch.from_numpy(np.sign(x) * np.log1p(self.mu * np.abs(x)) / np.log1p(self.mu)).float()

    def decode(self, x):
        x = x.double().cpu().numpy()
        return np.sign(x) * np.expm1(np.abs(x) * np.log1p(self.mu)) / self.mu * self.limit

    def files(self):
        return {"limit.json": json.dumps(self.limit).encode()}


class Wave(GaussianModality):
    """A wave under Gaussian diffusion of its loudness: the kind of modality."""

    length: int = Field(gt=0, description="samples of a wave")
    mu: float = Field(4.0, gt=0, description="of the mu-law: larger values stretch quiet samples")

    def build_codec(self, files):
        return LoudnessCodec(self.length, self.mu, files)

    def build_process(self, codec):
        return self.gaussian(self.length)

    def build_stream(self, codec):
        return Features.of(self.stream, features=self.length, patch=4)

    def render(self, value):  # in galleries
        return plot_lines(value)

    def features(self, codec, values):  # a classifier of real waves, in evaluations, hears no phase
        return np.abs(np.fft.rfft(np.stack(values)))


def sounds(n: int = 3000, seed: int = 0):
    """The data set: training and held-out sounds; a tenth of the texts is missing."""
    rng = np.random.default_rng(seed)
    waves, forms, texts = [], [], []
    for _ in range(n):
        form, speed = rng.choice(FORMS), rng.choice(list(SPEEDS))
        phase = (np.arange(STEPS) * SPEEDS[speed] / STEPS + rng.random()) % 1.0
        shapes = {
            "sine": np.sin(2 * np.pi * phase),
            "square": np.sign(phase - 0.5),
            "sawtooth": 2 * phase - 1,
            "triangle": 4 * np.abs(phase - 0.5) - 1,
        }
        waves.append(rng.uniform(0.7, 1.0) * shapes[form] + 0.03 * rng.normal(size=STEPS))
        forms.append(form)
        texts.append(None if rng.random() < 0.1 else f"a {speed} {form}")
    whole, cut = InMemory({"wave": waves, "form": forms, "text": texts}), round(0.9 * n)
    return whole.subset(np.arange(cut)), whole.subset(np.arange(cut, n))


STREAM = {"stream": {"width": 64}}
GAUSSIAN = {"prediction_type": "v_prediction", "loss": {"weighting": "learned"}, **STREAM}
MASKED = {"loss_on": "masked", "loss": {"weighting": "elbo", "scale": 0.3}, **STREAM}
CONFIG = {
    "name": "own_modality",
    "data": {"source": "own_modality:sounds"},
    "modalities": {
        "wave": {"kind": "own_modality:Wave", "length": STEPS, **GAUSSIAN},
        "form": {"kind": "label", **MASKED},
        "text": {"kind": "text", "alphabet": " adefghilmnoqrstuw", "length": 17, **MASKED},
    },
    "network": {"depth": 3, "heads": 4, "head_dim": 16, "time_scale": 100},
    "times": {"subset_prob": 0.4, "time_skew": {"form": 2, "text": 2}},
    "train": {"steps": 2000, "batch": 64, "lr": 2e-3, "warmup_steps": 50, "lr_schedule": "cosine", "ema": 0.99},
    "sample": {"steps": 24},
}

if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else CONFIG["train"]["steps"]
    config = parse_config({**CONFIG, "train": {**CONFIG["train"], "steps": steps, "save_every": steps}}, "CONFIG")
    Trainer(config, "runs/own_modality").run()
    pipe = Pipeline.from_pretrained("runs/own_modality")
    heard = sounds()[1][0]
    print("a real sound:", heard["form"], heard.get("text"))
    print("of its wave:", {m: pipe({"wave": heard["wave"]}, n=3)[m] for m in ("form", "text")})
    print("of this text:", pipe({"text": "a fast square"}, n=2)["wave"][0].round(1))
    print("all at once:", {m: pipe(n=3)[m] for m in ("form", "text")})
