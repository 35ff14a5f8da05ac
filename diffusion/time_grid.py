"""Time grids of sampling: the times between which a sampler makes its updates."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Gaussian, Process
from .schedules import GaussianSchedule

GRIDS = ("linear", "rho", "logsnr")


def time_grid(process: Process, steps: int, kind: str = "linear", start: float = 1.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64 times from `start` down to t_min, then 0, for `steps` updates.

    linear: evenly spaced (official). logsnr: evenly spaced in log-SNR. rho: evenly spaced in
    (σ/α)^(1/rho) as in EDM (arXiv 2206.00364, eq. 5). The last two are for Gaussian processes.

    Raises:
        ValueError: fewer than one step, an unknown kind, or a kind that the process does not have.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if kind not in GRIDS:
        raise ValueError(f"time_grid must be one of {', '.join(GRIDS)}, got {kind!r}")
    if kind != "linear" and not isinstance(process, Gaussian):
        raise ValueError(f"time_grid {kind} is for Gaussian modalities; a discrete one takes the linear grid")
    if start <= process.t_min:  # one update removes the little noise, the others change nothing
        return torch.tensor([start] + [0.0] * steps, dtype=torch.float64)
    if steps == 1:
        inner = torch.tensor([start], dtype=torch.float64)
    elif isinstance(process, Gaussian) and kind != "linear":
        inner = snr_grid(process.schedule, start, process.t_min, steps, rho if kind == "rho" else None)
    else:
        inner = torch.linspace(start, process.t_min, steps, dtype=torch.float64)
    return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])


def snr_grid(schedule: GaussianSchedule, start: float, stop: float, steps: int, rho: float | None) -> Tensor:
    """(steps,) float64 times from `start` to `stop`, evenly spaced in (σ/α)^(1/rho); rho None: in log-SNR."""
    noisy, clean = schedule.log_snr(torch.tensor([start, stop], dtype=torch.float64))
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    if rho is None:
        log_snr = noisy + share * (clean - noisy)
    else:
        noisy, clean = torch.exp(-noisy / (2.0 * rho)), torch.exp(-clean / (2.0 * rho))
        log_snr = -2.0 * rho * torch.log(noisy + share * (clean - noisy))
    times = schedule.time_of_log_snr(log_snr).clamp(stop, start)
    times[0], times[-1] = start, stop
    return times
