"""Fréchet Inception Distance with torchmetrics, against reference statistics that are stored and reused.

torchmetrics computes the distance. This file adds other feature networks, reference statistics as files, and a reader
for the official `.npy`, a pickled dictionary, which does not execute code from the file.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .image_folder import ImageFolder

INCEPTION = "inception"
BATCH = 64  # images per evaluation of the feature network
ALLOWED = {  # names in the pickle of an array of floats
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d), float64, of the features of n images.

    features: name of the network, "" if unknown (files of other tools). n: 0 if unknown.
    """

    mean: np.ndarray
    cov: np.ndarray
    n: int = 0
    features: str = ""

    def save(self, path: Path) -> None:
        """Write an .npz with mu, sigma, n and features; `load` and other FID tools read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.cov, n=self.n, features=self.features)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read an .npz with mu and sigma, or the official .npy of a dictionary with the two.

        Raises:
            ValueError: the file is missing, damaged, lacks the two arrays, has wrong shapes, or is a pickle of anything
                but arrays.
        """
        if not path.is_file():
            raise ValueError(f"reference statistics {str(path)!r} not found")
        try:
            raw = _read_npy(path) if path.suffix == ".npy" else dict(np.load(path, allow_pickle=False).items())
            mean, cov = (np.asarray(raw[key], dtype=np.float64) for key in ("mu", "sigma"))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: reference statistics need the arrays mu and sigma") from None
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not readable reference statistics ({error})") from None
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu has shape {mean.shape} and sigma {cov.shape}, expected (d,) and (d, d)")
        return cls(mean, cov, int(raw.get("n", 0)), str(raw.get("features", "")))


class FrechetDistance:
    """FID of images against reference statistics.

    Args:
        features: "inception" (2048 features, needs the extra `inception`); a TorchScript file; or `module:function`,
            which is called without arguments and returns an `nn.Module`. A network takes uint8 (n, C, H, W) and
            returns (n, d).
        shape: (C, H, W) of the images.

    Raises:
        ValueError: the network cannot be loaded.
    """

    def __init__(self, features: str, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        require_torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.name, self.device = features, torch.device(device)
        if features == INCEPTION:
            try:
                self.metric = FrechetInceptionDistance(2048, sync_on_compute=False)
            except ModuleNotFoundError:
                raise ValueError(
                    "FID's Inception network needs torch-fidelity and torchvision: pip install 'anystate[inception]', "
                    "or name another network with --features"
                ) from None
        else:
            self.metric = FrechetInceptionDistance(_FeatureNetwork(features, shape), sync_on_compute=False)
        self.metric = self.metric.to(self.device).eval()

    @torch.no_grad()
    def statistics(self, images: np.ndarray | ImageFolder) -> Statistics:
        """Statistics of uint8 images (n, H, W, C), n >= 2.

        Raises:
            ValueError: fewer than 2 images.
        """
        n = len(images)
        if n < 2:
            raise ValueError(f"FID needs at least 2 images, got {n}")
        self.metric.reset()
        for start in range(0, n, BATCH):
            batch = np.ascontiguousarray(images[start : start + BATCH].transpose(0, 3, 1, 2))
            x = torch.from_numpy(batch).to(self.device)
            if self.name == INCEPTION and x.shape[1] == 1:
                x = x.expand(-1, 3, -1, -1)
            self.metric.update(x, real=True)
        mean = self.metric.real_features_sum / n
        cov = (self.metric.real_features_cov_sum - n * torch.outer(mean, mean)) / (n - 1)
        return Statistics(mean.cpu().numpy(), cov.cpu().numpy(), n, self.name)

    def __call__(self, images: np.ndarray | ImageFolder, reference: Statistics) -> float:
        """The distance of uint8 images (n, H, W, C), n >= 2, to the reference.

        Raises:
            ValueError: fewer than 2 images, or the reference is of another network.
        """
        self.check(reference)
        return self.between(self.statistics(images), reference)

    def check(self, reference: Statistics) -> None:
        """Raise ValueError if the statistics name another feature network."""
        if reference.features not in ("", self.name):
            raise ValueError(f"the reference statistics are of the network {reference.features!r}, not {self.name!r}")

    @torch.no_grad()
    def between(self, own: Statistics, reference: Statistics) -> float:
        """The distance between two sets of statistics.

        Raises:
            ValueError: they have different numbers of features.
        """
        d = len(own.mean)
        if len(reference.mean) != d:
            raise ValueError(f"the reference statistics have {len(reference.mean)} features, the network {d}")
        for kind, statistics in (("real", reference), ("fake", own)):
            n = max(statistics.n, 2)
            mean, cov = (torch.from_numpy(a).to(self.device) for a in (statistics.mean, statistics.cov))
            setattr(self.metric, f"{kind}_features_sum", mean * n)
            setattr(self.metric, f"{kind}_features_cov_sum", cov * (n - 1) + n * torch.outer(mean, mean))
            setattr(self.metric, f"{kind}_features_num_samples", torch.tensor(n, device=self.device))
        return max(float(self.metric.compute()), 0.0)


class _FeatureNetwork(nn.Module):
    """A feature network in the interface of torchmetrics: `num_features`, and float64 outputs."""

    def __init__(self, source: str, shape: tuple[int, int, int]):
        super().__init__()
        self.network = _network(source).eval()
        try:
            with torch.no_grad():
                out = self.network(torch.zeros(2, *shape, dtype=torch.uint8))
            self.num_features = int(out.shape[1])
            fits = out.ndim == 2 and len(out) == 2
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"--features {source}: fails on uint8 images {shape}: {_last_line(error)}") from None
        if not fits:
            raise ValueError(f"--features {source}: returned {tuple(out.shape)} for 2 images, expected (2, features)")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).double()


def require_torchmetrics() -> None:
    """Raise ValueError if torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise ValueError("FID and CLIP score need torchmetrics: pip install 'anystate[eval]'") from None


def _network(source: str) -> nn.Module:
    """The network of a TorchScript file or of `module:function`."""
    module, separator, function = source.partition(":")
    if Path(source).is_file():
        try:
            return torch.jit.load(source, map_location="cpu")
        except RuntimeError as error:
            raise ValueError(f"{source}: not a TorchScript file ({_last_line(error)})") from None
    if not separator:
        raise ValueError(f"--features {source!r} is neither inception, a TorchScript file, nor module:function")
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--features {source}: {error}") from None
    if not isinstance(network, nn.Module):
        raise ValueError(f"--features {source}: returned {type(network).__name__}, not a torch nn.Module")
    return network


def _last_line(error: Exception) -> str:
    """The last line of an error message; those of TorchScript begin with a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _read_npy(path: Path) -> dict:
    """The dictionary in an official statistics file, an .npy with one pickled object."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if shape != () or not dtype.hasobject:
            raise KeyError("mu")
        found = _ArrayUnpickler(io.BytesIO(file.read())).load()
    return found.item() if isinstance(found, np.ndarray) else found


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not part of an array")
        return super().find_class(module, name)
