"""FID against closed forms, and reference files of every kind, malicious ones included."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from anystate.bench.quality.fid import FrechetDistance, Statistics
from anystate.bench.quality.frechet import frechet, moments

SHAPE = (3, 8, 8)


class Convolutions(nn.Module):
    """A small seeded random network, uint8 images to 6 features."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 6, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x / 255.0))).mean((2, 3))


class Pixels(nn.Module):
    """The first two values of an image as float64: features that a test can choose."""

    def forward(self, x):
        return x.flatten(1)[:, :2].double()


def pixels():
    return Pixels()


def numbers():
    return 3


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.pt"
    torch.jit.script(Convolutions()).save(str(path))
    return str(path)


def images(n, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (n, 8, 8, 3), dtype=np.uint8)


def test_closed_form_of_two_gaussians():
    """Commuting covariances: |Δμ|² + Σ (√λ − √λ')², in float64."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    a, b = rng.uniform(0.1, 4.0, 5), np.array([0.0, 1.0, 2.0, 3.0, 1e-9])
    mean = rng.normal(size=5)
    truth = 2.25 * 5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    got = frechet(mean, q * a @ q.T, mean + 1.5, q * b @ q.T)
    assert got == pytest.approx(truth, rel=1e-7)  # a zero eigenvalue is known to 1e-16, its root to 1e-8


def test_distance_to_statistics_equals_the_closed_form():
    """Images with chosen features against chosen moments, computed by torchmetrics."""
    drawn = images(200, 1)
    mean, cov = np.array([100.0, 130.0]), np.array([[900.0, 200.0], [200.0, 1600.0]])
    distance = FrechetDistance(f"{__name__}:pixels", SHAPE)
    chosen = drawn.transpose(0, 3, 1, 2).reshape(200, -1)[:, :2]
    truth = frechet(*moments(chosen), mean, cov)
    assert distance(drawn, Statistics(mean, cov)) == pytest.approx(truth, rel=1e-10)


def test_statistics_of_images_agree_with_numpy_for_any_batches(script):
    distance, drawn = FrechetDistance(script, SHAPE), images(150, 2)
    got = distance.statistics(drawn)
    with torch.no_grad():
        features = Convolutions()(torch.from_numpy(drawn.transpose(0, 3, 1, 2).copy())).numpy()
    mean, cov = moments(features)
    np.testing.assert_allclose(got.mean, mean, atol=1e-7)
    np.testing.assert_allclose(got.cov, cov, atol=1e-7)
    assert got.n == 150
    assert distance(drawn, got) == pytest.approx(0.0, abs=1e-6)
    assert distance(images(150, 3, 0, 128), got) > 1e-3


def test_statistics_are_stored_and_reused(script, tmp_path):
    distance = FrechetDistance(script, SHAPE)
    statistics = distance.statistics(images(50, 4))
    statistics.save(tmp_path / "a" / "ref.npz")
    again = Statistics.load(tmp_path / "a" / "ref.npz")
    assert (again.n, again.features) == (50, script)
    assert distance(images(50, 5), again) == distance(images(50, 5), statistics)
    other = FrechetDistance(f"{__name__}:pixels", SHAPE)
    with pytest.raises(ValueError, match=r"not '.*:pixels'"):
        other(images(50, 5), again)


def test_reading_official_files(tmp_path):
    """A pickled dictionary in an .npy, and an .npz of mu and sigma."""
    mean, cov = np.arange(3.0), np.eye(3)
    np.save(tmp_path / "official.npy", {"mu": mean, "sigma": cov})
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, pool=np.zeros(4))
    for name in ("official.npy", "adm.npz"):
        read = Statistics.load(tmp_path / name)
        assert np.array_equal(read.mean, mean)
        assert np.array_equal(read.cov, cov)
        assert (read.n, read.features) == (0, "")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, kind):
    path, made = tmp_path / f"bad.{kind}", tmp_path / "made"
    if kind == "npy":
        np.save(path, np.array(Malicious(made), dtype=object), allow_pickle=True)
    else:
        np.savez(path, mu=np.array([Malicious(made)], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="not readable reference statistics"):
        Statistics.load(path)
    assert not made.exists()


def test_damaged_statistics(tmp_path):
    for name, content in {"a.npz": b"PK nothing", "b.npy": b"", "c.npy": pickle.dumps({"mu": 1})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            Statistics.load(tmp_path / name)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match="need the arrays mu and sigma"):
        Statistics.load(tmp_path / "plain.npy")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"\(3,\) and sigma \(2, 2\)"):
        Statistics.load(tmp_path / "shape.npz")
    with pytest.raises(ValueError, match="not found"):
        Statistics.load(tmp_path / "gone.npz")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("nowhere", "neither inception"),
        ("no.such:thing", "no.such"),
        (f"{__name__}:gone", "gone"),
        (f"{__name__}:numbers", "returned int"),
    ],
)
def test_networks_that_cannot_be_loaded(features, message):
    with pytest.raises(ValueError, match=message):
        FrechetDistance(features, SHAPE)


def test_a_file_that_is_not_a_network(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        FrechetDistance(str(tmp_path / "net.pt"), SHAPE)


def test_inception_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"anystate\[inception\]"):
        FrechetDistance("inception", SHAPE)


def test_too_few_images(script):
    with pytest.raises(ValueError, match="at least 2"):
        FrechetDistance(script, SHAPE)(images(1, 0), Statistics(np.zeros(6), np.eye(6)))
