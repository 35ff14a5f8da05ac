"""`anystate score`: FID and CLIP score of a folder of images from any source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from ...sample.folder import MANIFEST, TRAJECTORY
from .clip import CLIP, ClipScore
from .fid import INCEPTION, FrechetDistance, Statistics
from .image_folder import SUFFIXES, ImageFolder


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Settings of `anystate score`.

    Args:
        images: folder of images; a folder written by `anystate sample` contains its captions.
        reference: FID against these statistics (.npz, .npy) or the images of this folder.
        captions: CLIP score with these: a text file, one caption per line in the order of the images' paths.
        save: write the images' statistics to this .npz, to be a reference later.
        size: side that all images are resized to; default: they have one size already.
    """

    images: Path
    reference: Path | None = None
    captions: Path | None = None
    save: Path | None = None
    features: str = INCEPTION
    clip: str = CLIP
    size: int | None = None


def score(request: ScoreRequest, device: torch.device | str = "cpu") -> dict[str, dict]:
    """{metric: {value, samples, …}}: fid if there is a reference, clip if there are captions.

    Raises:
        ValueError: nothing to measure, or anything that cannot be read or does not fit.
    """
    folder, captions = request.images, request.captions
    if (folder / MANIFEST).is_file():  # written by `anystate sample`
        folder, sampled = sampled_files(folder)
        captions = captions or sampled
    if request.reference is None and request.save is None and captions is None:
        raise ValueError("nothing to measure: give --reference for FID, --captions for CLIP score, or --save")
    if request.size is not None and request.size < 1:
        raise ValueError(f"--size must be at least 1, got {request.size}")
    if request.save is not None and request.save.suffix != ".npz":
        raise ValueError(f"--save {request.save}: statistics are written as .npz, choose such a name")
    images = ImageFolder(folder, request.size and (request.size, request.size, 3))
    texts = None if captions is None else _captions(captions, len(images))
    values = {}
    if request.reference is not None or request.save is not None:
        values |= _fid(request, images, device)
    if texts is not None:
        values["clip"] = {"value": ClipScore(request.clip, device)(images, texts), "samples": len(images)}
    return values


def sampled_files(folder: Path) -> tuple[Path, Path | None]:
    """The folder of images and the file of captions that `anystate sample` wrote; None if there is not one such file.

    Raises:
        ValueError: images of several modalities.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    inside = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != TRAJECTORY]
    images = sorted(path for path in inside if any(file.suffix in SUFFIXES for file in path.iterdir()))
    if len(images) > 1:
        names = ", ".join(path.name for path in images)
        raise ValueError(f"{folder} holds images of several modalities: name one of its folders {names}")
    texts = sorted(folder.glob("*.txt"))
    captions = [path for path in texts if path.stem in manifest.get("captions", [path.stem])]
    return images[0] if images else folder, captions[0] if len(captions) == 1 else None


def _fid(request: ScoreRequest, images: ImageFolder, device: torch.device | str) -> dict[str, dict]:
    height, width, channels = images.shape
    distance = FrechetDistance(request.features, (channels, height, width), device)
    reference = request.reference and _reference(request.reference, distance, images.shape)
    own = distance.statistics(images)
    if request.save is not None:
        own.save(request.save)
    if reference is None:
        return {}
    return {"fid": {"value": distance.between(own, reference), "samples": own.n, "reference": reference.n}}


def _reference(path: Path, distance: FrechetDistance, shape: tuple[int, int, int]) -> Statistics:
    if path.is_dir():
        return distance.statistics(ImageFolder(path, shape))
    reference = Statistics.load(path)
    distance.check(reference)
    return reference


def _captions(path: Path, n: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"--captions {path} is not a readable text file") from None
    if len(lines) != n:
        raise ValueError(f"--captions {path} has {len(lines)} lines for {n} images: write one line per image")
    return lines
