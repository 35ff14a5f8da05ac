"""CLIP score with a small random model of the real class, saved and read like one from the hub."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anystate.train.metrics.clip import ClipScore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a CLIPModel with its processor."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-'"
    symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(symbols), "max_position_embeddings": 32, "eos_token_id": len(symbols) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **sizes}, vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.CLIPModel(config)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokens = transformers.CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[])
    folder = tmp_path_factory.mktemp("clip")
    net.save_pretrained(folder)
    transformers.CLIPProcessor(pictures, tokens).save_pretrained(folder)
    return folder


def test_score_is_the_cosine(model):
    """100 cos of the two embeddings, averaged over pairs, whatever the chunks; grey pictures count as RGB."""
    pictures = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 1), dtype=np.uint8)
    captions = [f"a {i % 7}" for i in range(70)]
    got = ClipScore(str(model))(pictures, captions)
    net = transformers.CLIPModel.from_pretrained(model).eval()
    processor = transformers.CLIPProcessor.from_pretrained(model)
    inputs = processor(text=captions, images=list(np.repeat(pictures, 3, -1)), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = net(**inputs)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert got == pytest.approx(max(float(100 * cosine.mean()), 0.0), abs=1e-3)


def test_no_model_there(tmp_path):
    with pytest.raises(ValueError, match="no CLIP model there"):
        ClipScore(str(tmp_path))
