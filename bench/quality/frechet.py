"""Fréchet distance between Gaussians fitted to two sets of feature vectors (arXiv 1706.08500, eq. 6)."""

from __future__ import annotations

import numpy as np


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d), float64, of features (n, d), n >= 2."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet(mean: np.ndarray, cov: np.ndarray, mean_ref: np.ndarray, cov_ref: np.ndarray) -> float:
    """|μ − μ'|² + tr(Σ + Σ' − 2 (Σ^½ Σ' Σ^½)^½).

    In this symmetric form the eigenvalues are real and non-negative also for singular covariances; those of Σ Σ' are
    not, in floating point.
    """
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov_ref @ root).clip(0.0)
    distance = np.sum((mean - mean_ref) ** 2) + np.trace(cov) + np.trace(cov_ref) - 2.0 * np.sqrt(inner).sum()
    return float(max(distance, 0.0))
