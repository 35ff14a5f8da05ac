"""CLIP score with a small random CLIPModel, saved and loaded like one from the hub."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anystate.bench.quality.clip import ClipScore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_score_is_the_cosine(clip_model):
    """100 cos of the two embeddings, averaged over pairs, for any number of batches; grey images become RGB."""
    images = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 1), dtype=np.uint8)
    captions = [f"a {i % 7}" for i in range(70)]
    got = ClipScore(str(clip_model))(images, captions)
    net = transformers.CLIPModel.from_pretrained(clip_model).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip_model)
    inputs = processor(text=captions, images=list(np.repeat(images, 3, -1)), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = net(**inputs)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert got == pytest.approx(max(float(100 * cosine.mean()), 0.0), abs=1e-3)


def test_a_missing_model(tmp_path):
    with pytest.raises(ValueError, match="no CLIP model could be loaded"):
        ClipScore(str(tmp_path))
