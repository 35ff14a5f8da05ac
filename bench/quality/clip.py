"""CLIP score with torchmetrics: 100 · cosine between the embeddings of an image and its caption (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .fid import require_torchmetrics
from .image_folder import ImageFolder

CLIP = "openai/clip-vit-large-patch14"  # the model of the official evaluation
BATCH = 64


class ClipScore:
    """Mean CLIP score of image-caption pairs.

    Args:
        model: folder of a saved `CLIPModel` with its processor, or a Hugging Face id.

    Raises:
        ValueError: a package is missing or the model cannot be loaded.
    """

    def __init__(self, model: str = CLIP, device: torch.device | str = "cpu"):
        require_torchmetrics()
        from torchmetrics.multimodal.clip_score import CLIPScore

        self.device = torch.device(device)
        self.metric = CLIPScore(lambda: _load(model), sync_on_compute=False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | ImageFolder, captions: Sequence[str]) -> float:
        """The mean score of uint8 images (n, H, W, C) and their n captions."""
        self.metric.reset()
        for start in range(0, len(images), BATCH):
            batch = np.ascontiguousarray(images[start : start + BATCH].transpose(0, 3, 1, 2))
            x = torch.from_numpy(batch).to(self.device)
            if x.shape[1] == 1:
                x = x.expand(-1, 3, -1, -1)
            self.metric.update(x, list(captions[start : start + BATCH]))
        return float(self.metric.compute())


class _TensorOutputs(nn.Module):
    """A CLIP model whose embeddings are tensors: since transformers 5 they are inside an output object."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _embedding(self.model.get_image_features(pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return _embedding(self.model.get_text_features(tokens, mask))


def _embedding(output) -> Tensor:
    return getattr(output, "pooler_output", output)


def _load(name: str):
    """(model, processor), as torchmetrics expects them."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ValueError("CLIP score needs transformers: pip install 'anystate[eval]'") from None
    try:
        return _TensorOutputs(CLIPModel.from_pretrained(name).eval()), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"--clip {name}: no CLIP model could be loaded ({message})") from None
