"""The quantile curve of a numerical column: values ↔ z, standard normal numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor


@dataclasses.dataclass
class Quantiles:
    """A monotone, piecewise linear map between the values of a column and z.

    z = Φ⁻¹(m + (1 − 2m) F(value)), with F the empirical distribution function of the training values and m the margin.
    Hence the training values become standard normal; a z in either tail beyond the margin decodes to the smallest or
    the largest training value.

    Args:
        share, value: knots of F: probabilities from 0 to 1, and the values there; both rise.
        width: the values are multiples of it. Encoding adds uniform noise in ±width/2, decoding rounds; 0: no rounding.
        margin: probability of each tail that decodes to an end.
        low, high: the smallest and the largest training value.
        edge: probability of each tail that `clip_tails` moves to an end; 0: the margin.
    """

    share: list[float]
    value: list[float]
    width: float
    margin: float
    low: float
    high: float
    edge: float = 0.0

    @classmethod
    def fit(
        cls, values: np.ndarray, width: float, n_quantiles: int, rng: np.random.Generator, tail_rows: float = 2.0
    ) -> Quantiles:
        """The curve of the training values (N,).

        Args:
            n_quantiles: knots of the curve, at most.
            tail_rows: N rows of standard normal z have this many rows in each tail that `clip_tails` moves, on average.
        """
        dequantized = np.sort(values + width * (rng.random(len(values)) - 0.5))
        dequantized[0], dequantized[-1] = values.min() - width / 2, values.max() + width / 2
        margin, edge = (min(rows / len(values), 0.01) for rows in (2.0, tail_rows))
        z = np.linspace(ndtri(margin), -ndtri(margin), min(n_quantiles, max(2, len(values))))
        share = (ndtr(z) - margin) / (1.0 - 2.0 * margin)
        share[0], share[-1] = 0.0, 1.0
        value = np.quantile(dequantized, share)
        return cls(share.tolist(), value.tolist(), width, margin, float(values.min()), float(values.max()), edge)

    def encode(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """z of the values (N,)."""
        dequantized = values + self.width * (rng.random(len(values)) - 0.5)
        return self.to_z(np.interp(dequantized, self.value, self.share))

    def to_z(self, share: np.ndarray) -> np.ndarray:
        """z of probabilities F(value); those outside [0, 1] are clipped."""
        return ndtri(self.margin + (1.0 - 2.0 * self.margin) * np.clip(share, 0.0, 1.0))

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Values of z (N,), rounded to the width and within the range of the training values."""
        margin = 1.001 * self.margin  # rounding z to float32 must not move an end inside the curve
        share = np.clip((ndtr(z.astype(np.float64)) - margin) / (1.0 - 2.0 * margin), 0.0, 1.0)
        values = np.interp(share, self.share, self.value)
        if self.width:
            values = np.round(values / self.width) * self.width
        return np.clip(values, self.low, self.high)

    def clip_tails(self, z: Tensor) -> Tensor:
        """Generated z, those in a tail of probability `edge` replaced by a z that decodes to that end.

        Networks learn lighter tails than the data's: without this, the smallest and largest values are too rare.
        """
        in_tail = z.abs() >= -float(ndtri(max(self.edge, self.margin)))
        return torch.where(in_tail, -1.01 * float(ndtri(self.margin)) * z.sign(), z)

    def interval(self, low: float, high: float) -> tuple[float, float]:
        """The interval of F whose values, once rounded, lie in [low, high]."""
        half = 0.4999 * self.width
        return tuple(float(np.interp(v, self.value, self.share)) for v in (low - half, high + half))
