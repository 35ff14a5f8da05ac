"""`anystate score`: FID and CLIP score of a folder of pictures, whatever made them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .clip import DEFAULT as CLIP
from .clip import ClipScore
from .fid import INCEPTION, FrechetDistance, Statistics
from .pictures import Pictures


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        pictures: folder of pictures; one written by `anystate sample` brings its captions along.
        reference: FID against these statistics (.npz, .npy) or the pictures of this folder.
        captions: CLIP score with these: a text file, a caption a line in the order of the pictures' paths.
        save: keep the pictures' statistics in this .npz, to be a reference later.
        size: side that all pictures are brought to; default: they have one size already.
    """

    pictures: Path
    reference: Path | None = None
    captions: Path | None = None
    save: Path | None = None
    features: str = INCEPTION
    clip: str = CLIP
    size: int | None = None


def score(request: Request, device: torch.device | str = "cpu") -> dict[str, dict]:
    """{measure: {value, samples, …}}: fid where there is a reference, clip where there are captions.

    Raises:
        ValueError: nothing to measure, or anything that cannot be read or does not fit.
    """
    folder, captions = request.pictures, request.captions
    if (folder / "manifest.json").is_file() and (folder / "image").is_dir():  # of `anystate sample`
        captions = captions or folder / "text.txt"
        folder = folder / "image"
    if request.reference is None and request.save is None and captions is None:
        raise ValueError("nothing to measure: give --reference for FID, --captions for CLIP score, or --save")
    if request.size is not None and request.size < 1:
        raise ValueError(f"--size must be at least 1, got {request.size}")
    if request.save is not None and request.save.suffix != ".npz":
        raise ValueError(f"--save {request.save}: statistics are kept in an .npz file")
    pictures = Pictures(folder, request.size and (request.size, request.size, 3))
    texts = None if captions is None else _captions(captions, len(pictures))
    values = {}
    if request.reference is not None or request.save is not None:
        height, width, channels = pictures.shape
        distance = FrechetDistance(request.features, (channels, height, width), device)
        reference = request.reference and _reference(request.reference, distance, pictures.shape)
        own = distance.statistics(pictures)
        if request.save is not None:
            own.save(request.save)
        if reference is not None:
            values["fid"] = {"value": distance.between(own, reference), "samples": own.n, "reference": reference.n}
    if texts is not None:
        values["clip"] = {"value": ClipScore(request.clip, device)(pictures, texts), "samples": len(pictures)}
    return values


def _reference(path: Path, distance: FrechetDistance, shape: tuple[int, int, int]) -> Statistics:
    if path.is_dir():
        return distance.statistics(Pictures(path, shape))
    reference = Statistics.load(path)
    distance.check(reference)
    return reference


def _captions(path: Path, n: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"--captions {path} is not a readable text file") from None
    if len(lines) != n:
        raise ValueError(f"--captions {path} has {len(lines)} lines for {n} pictures: give one for each")
    return lines
