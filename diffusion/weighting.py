"""Weightings of a modality's loss as functions of its time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .processes import Process

WEIGHTINGS = ("none", "elbo", "balanced", "min_snr", "learned")


class Weighting(nn.Module):
    """λ · w(t) · loss for one modality.

    none: w = 1. elbo: the weight of the negative ELBO, 1/t for the log-linear masked process. balanced: w = 1, for a
    masked process whose loss weights its masked positions itself (see `Masked`). min_snr: min(SNR, γ)/SNR, Gaussian
    only. learned: loss/eᵘ + u with u(t) a small network, one uncertainty per time (EDM2, arXiv 2312.02696, eq. 21); it
    starts at u = 0.
    """

    def __init__(self, process: Process, kind: str = "none", scale: float = 1.0, gamma: float = 5.0):
        super().__init__()
        if kind not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {kind!r}")
        if (kind == "balanced") != getattr(process, "balanced", False):
            raise ValueError("weighting balanced is for masked modalities with loss_on: masked")
        self.process, self.kind, self.scale, self.gamma = process, kind, scale, gamma
        if kind in ("elbo", "min_snr"):
            self.weight(torch.full((1,), 0.5, dtype=torch.float64))  # raises where there is none
        if kind == "learned":
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("frequency", 2 * math.pi * torch.randn(64, generator=generator))
            self.register_buffer("phase", 2 * math.pi * torch.rand(64, generator=generator))
            self.uncertainty = nn.Linear(64, 1, bias=False)
            nn.init.zeros_(self.uncertainty.weight)

    def forward(self, loss: Tensor, t: Tensor) -> Tensor:
        """(B,) weighted loss; t (B,)."""
        if self.kind == "learned":
            features = math.sqrt(2.0) * torch.cos(t.float()[:, None] * self.frequency + self.phase)
            u = self.uncertainty(features).squeeze(-1)
            return self.scale * (loss * torch.exp(-u) + u)
        return self.scale * loss * self.weight(t).to(loss.dtype)

    def sum(self, t: Tensor, mask: Tensor, *prediction) -> tuple[Tensor, Tensor]:
        """(Σ mask · weighted loss, detached unweighted loss (B,)); the prediction: the arguments of `Process.loss`."""
        return self.process.loss_sum(lambda loss: self(loss, t) * mask, self.kind != "learned", *prediction)

    def weight(self, t: Tensor) -> Tensor:
        if self.kind == "elbo":
            return self.process.elbo_weight(t)
        if self.kind == "min_snr":
            return self.process.min_snr_weight(t, self.gamma)
        return torch.ones_like(t)
