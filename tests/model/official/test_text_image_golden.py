"""The network and its weights against the official implementation."""

from __future__ import annotations

import pytest
import torch

from anystate.model.official.text_image import load_official, to_official

MODELS = {"net": "weights/", "net_b": "weights_b/"}


@pytest.fixture(scope="session")
def models(golden):
    return {section: load_official(golden.below(prefix)) for section, prefix in MODELS.items()}


def cases(golden, section: str) -> list[str]:
    return sorted({key.split("/")[1] for key in golden.tensors if key.startswith(f"{section}/")})


@pytest.mark.parametrize("section", MODELS)
def test_official_weights_convert_and_convert_back(golden, models, section):
    model, unused = models[section]
    official = golden.below(MODELS[section])
    assert unused == []
    back = to_official(model)
    assert set(back) == set(official)
    for key, value in official.items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("section", MODELS)
def test_outputs_equal_the_official_network(golden, models, close, section):
    model, _ = models[section]
    for case in cases(golden, section):

        def g(name, case=case):
            return golden[f"{section}/{case}/{name}"]

        mask = {"text": g("text_mask")} if f"{section}/{case}/text_mask" in golden else None
        inputs = {"text": g("tokens"), "image": g("image")}
        times = {"text": g("text_time"), "image": g("image_time")}
        with torch.no_grad():
            out = model(inputs, times, mask)
        close(out["image"], g("out_image"), 1e-4, f"{case} image")
        close(model.time["text"](times["text"]), g("text_time_emb"), 1e-4 * g("text_time_emb").abs().max(), "time")
        if "text" in model.head:
            raw = out["text"].values()
            ours = torch.cat([torch.log_softmax(raw[..., :-1], -1), raw[..., -1:]], -1)
            close(ours, g("out_text"), 1e-4, f"{case} text")
        else:  # without single-stream text blocks the official network returns its embedding of the input
            close(model.embed["text"](inputs["text"]), g("out_text"), 1e-5, f"{case} embedding")


def test_only_requested_outputs_are_computed(golden, models):
    model, _ = models["net"]
    inputs = {"text": golden["net/all/tokens"], "image": golden["net/all/image"]}
    times = {"text": golden["net/all/text_time"], "image": golden["net/all/image_time"]}
    ran = []
    hooks = [model.head[m].register_forward_hook(lambda *_, m=m: ran.append(m)) for m in model.head]
    hooks += [model.tower[m][0].register_forward_hook(lambda *_, m=m: ran.append(m)) for m in model.tower]
    both = model(inputs, times)
    ran.clear()
    alone = model(inputs, times, outputs=["image"])
    for hook in hooks:
        hook.remove()
    assert set(alone) == {"image"}
    assert ran == ["image", "image"]
    torch.testing.assert_close(alone["image"], both["image"], rtol=0, atol=1e-5)


def test_a_missing_official_key_is_named(golden):
    official = golden.below("weights/")
    gone = "joint_embedding.blocks.0.joint_attn.to_out.0.weight"
    with pytest.raises(ValueError, match=gone):
        load_official({key: value for key, value in official.items() if key != gone})


def test_requesting_a_missing_head(golden, models):
    model, _ = models["net_b"]
    section = "net_b/masked"
    inputs = {"text": golden[f"{section}/tokens"], "image": golden[f"{section}/image"]}
    times = {"text": golden[f"{section}/text_time"], "image": golden[f"{section}/image_time"]}
    with pytest.raises(ValueError, match="no head for 'text'"):
        model(inputs, times, outputs=["text"])
