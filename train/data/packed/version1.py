"""Descriptions of packed data of version 1, which held one image and one text, as entries of today's `dataset.yaml`."""

from __future__ import annotations

from typing import Any


def upgrade(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{modality: its entry} from the sections `image` and `text`."""
    return {"image": _image(raw["image"]), "text": _text(raw["text"])}


def _image(about: dict[str, Any]) -> dict[str, Any]:
    size, channels = about["size"], about["channels"]
    settings = {"kind": "image", "channels": channels, "size": size}
    if about["kind"] == "latents":
        array = {"shape": [2 * channels, size, size], "dtype": "float16"}
        settings["latents"] = {"vae": about["vae"], "scale": about["scale"]}
    else:
        array = {"shape": [size, size, channels], "dtype": "uint8"}
        settings["pixel_max"] = about["pixel_max"]
    return {"parts": {"image": {"part": "", **array}}, "codec": about, "versions": False, "settings": settings}


def _text(about: dict[str, Any]) -> dict[str, Any]:
    settings = {"kind": "text", "length": about["length"]}
    if about["kind"] == "characters":
        kind, files = "characters", {}
        settings["alphabet"] = about["alphabet"]
    else:
        kind, files = "subwords", {"tokenizer.json": about["file"]} if about["file"] else {}
        settings["tokenizer"] = {key: about[key] for key in ("kind", "states", "pad", "start", "end")}
        settings["tokenizer"]["path"] = "{folder}/" + about["file"]
    array = {"part": "", "shape": [about["length"]], "dtype": "int32", "states": about["states"]}
    counts = {"truncated": about.get("cut", 0)}
    return {
        "parts": {"text": array},
        "codec": {**about, "kind": kind},
        "raw": "captions",
        "files": files,
        "settings": settings,
        "about": counts,
    }
