"""CLIP score with a small random model of the real class, saved and read like one from the hub."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anystate.bench.quality.clip import ClipScore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_score_is_the_cosine(clip_model):
    """100 cos of the two embeddings, averaged over pairs, whatever the chunks; grey pictures count as RGB."""
    pictures = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 1), dtype=np.uint8)
    captions = [f"a {i % 7}" for i in range(70)]
    got = ClipScore(str(clip_model))(pictures, captions)
    net = transformers.CLIPModel.from_pretrained(clip_model).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip_model)
    inputs = processor(text=captions, images=list(np.repeat(pictures, 3, -1)), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = net(**inputs)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert got == pytest.approx(max(float(100 * cosine.mean()), 0.0), abs=1e-3)


def test_no_model_there(tmp_path):
    with pytest.raises(ValueError, match="no CLIP model there"):
        ClipScore(str(tmp_path))
