"""`anystate import-official`: conversion of a checkpoint of the official text+image code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...configs.config import Config
from ...configs.load import load_config, parse_config
from ...configs.runs import latest
from ..build import Codecs, build_codecs, build_network, codec_files
from ..layers import sincos_2d
from ..storage import check_shapes, sha256
from .files import read_pt, read_safetensors, save_imported, weight_sets
from .table import is_table
from .text_image import POSITION, from_official, streams

RECIPE = "text_image/stage3"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The weights in an official checkpoint.

    Args:
        weights: {"raw" or "ema": state dict}; published files hold one set, which is used for both.
        step: optimizer steps of its training, 0 if the file does not say.
    """

    file: Path
    weights: dict[str, Mapping[str, Tensor]]
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an import; `used` and `unused` are official keys, `tokenizer` is a note about the tokenizer."""

    folder: Path
    weights: list[str]
    used: list[str]
    unused: list[str]
    tokenizer: str | None

    def lines(self) -> list[str]:
        """The report as text."""
        two_sets = len(self.weights) == 2
        kinds = "raw and EMA weights" if two_sets else "one set of weights, used for both raw and EMA"
        lines = [f"{len(self.used)} tensors used, {len(self.unused)} not ({kinds})"]
        lines += [f"  not used: {key}" for key in self.unused]
        if self.tokenizer:
            lines.append(self.tokenizer)
        lines.append(f"wrote {self.folder}; sample with: anystate sample {self.folder.parent}")
        return lines


def import_official(
    source: str, out: Path, vae: str | None = None, tokenizer: str | None = None, heads: int | None = None
) -> Report:
    """Convert the official checkpoint `source` into a checkpoint in the run folder `out`.

    Args:
        source: a .pt snapshot, a .safetensors file, a folder with one of either, or a Hugging Face id.
        vae, tokenizer: the autoencoder and the CLIP tokenizer; default those of the config of the published model.
        heads: of the attention, where the weights do not show them (`qk_rmsnorm: false`); default 8.

    Raises:
        ValueError: not found, a damaged file, one with pickled code, or another network; or `out` has a checkpoint.
    """
    if latest(out):
        raise ValueError(f"{out} already holds a checkpoint: choose another --out")
    snapshot = read_snapshot(find(source))
    if any(is_table(state) for state in snapshot.weights.values()):
        raise ValueError(
            f"{snapshot.file} is of the official tabular code: add --table with the data set it was trained on"
        )
    states, unused = {}, []
    for kind, state in snapshot.weights.items():
        states[kind], unused = from_official(state)
        _check_positions(state, snapshot.file)
    example = next(iter(snapshot.weights.values()))
    config = describe(example, vae, tokenizer, heads)
    with torch.device("meta"):  # only names and shapes are needed
        network = build_network(config, build_codecs(config))
    for state in states.values():
        check_shapes(snapshot.file, network.state_dict(), state)
    files, note = _tokenizer_files(build_codecs(config))
    used = sorted(set(example) - set(unused))
    about = {
        "source": source,
        "file": str(snapshot.file),
        "sha256": sha256(snapshot.file),
        "weights": sorted(states),
        "step": snapshot.step,
        "used": used,
        "unused": unused,
    }
    folder = save_imported(out, snapshot.step, states, config, about, files)
    return Report(folder, sorted(states), used, unused, note)


def describe(
    state: Mapping[str, Tensor], vae: str | None = None, tokenizer: str | None = None, heads: int | None = None
) -> Config:
    """A config of the published model with the sizes of a state dict."""
    raw = load_config(RECIPE).model_dump(mode="json")
    raw.update(name="official", init=None)
    raw["data"] = None
    parts, depth, heads, head_dim, _, qk_norm = streams(state, heads)
    text, image = parts["text"], parts["image"]
    for m, part in parts.items():
        shape = {
            "width": part.width,
            "cond": part.cond,
            "single_stream_depth": part.single_stream_depth,
            "output": part.output,
        }
        raw["modalities"][m]["stream"].update(shape)
    raw["modalities"]["image"].update(channels=image.channels, size=image.size)
    raw["modalities"]["image"]["stream"]["patch"] = image.patch
    raw["modalities"]["text"]["length"] = text.length
    # the last two tokens of a CLIP vocabulary are start and end; the end token is also the pad
    special = {"pad": text.states - 1, "start": text.states - 2, "end": text.states - 1}
    raw["modalities"]["text"]["tokenizer"].update(states=text.states, **special)
    raw["network"].update(depth=depth, heads=heads, head_dim=head_dim, qk_norm=qk_norm)
    if vae is not None:
        raw["modalities"]["image"]["latents"]["vae"] = vae
    if tokenizer is not None:
        raw["modalities"]["text"]["tokenizer"]["path"] = tokenizer
    return parse_config(raw, "the official checkpoint")


def find(source: str) -> Path:
    """The weights file of a path or a Hugging Face id, downloaded if necessary.

    Raises:
        ValueError: not found, several files in a folder, or not available on the hub.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise ValueError(f"{path}: expected one .safetensors or .pt file in this folder, found {names}")
        return found[0]
    if path.suffix in (".safetensors", ".pt", ".pth") or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"official checkpoint {source!r} not found")
    return _download(source)


def read_snapshot(file: Path) -> Snapshot:
    """The content of an official .pt snapshot or .safetensors file; pickled code is refused.

    Raises:
        ValueError: a damaged file, one with pickled code, or one without weights.
    """
    if file.suffix == ".safetensors":
        return Snapshot(file, {"ema": read_safetensors(file)})
    content = read_pt(file)
    sets = weight_sets(content)
    if not sets:
        raise ValueError(f"{file} has neither 'model' nor 'ema' weights; it holds {', '.join(map(str, content))[:200]}")
    for state in sets.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{file}: {key!r} is not a tensor")
    scheduler = content.get("scheduler")
    step = scheduler.get("last_epoch", 0) if isinstance(scheduler, dict) else 0
    return Snapshot(file, sets, step if isinstance(step, int) and step >= 0 else 0)


def _check_positions(state: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError if the table of patch positions differs from the constant table of this package."""
    table = state[POSITION][0].float()
    ours = sincos_2d(round(len(table) ** 0.5), table.shape[1])
    if ours.shape != table.shape or (ours - table).abs().max() > 1e-2:  # files may be in half precision
        raise ValueError(f"{file}: {POSITION!r} is not the sine table of the official network")


def _tokenizer_files(codecs: Codecs) -> tuple[dict[str, bytes], str | None]:
    """The tokenizer as a file of the checkpoint, or a note if it is not available now."""
    try:
        return codec_files(codecs), None
    except ValueError as error:
        return {}, f"the tokenizer is not in the checkpoint and will be loaded when sampling: {error}"


def _download(source: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            f"{source!r} is not a file; as a Hugging Face id it needs huggingface_hub: pip install anystate[latents]"
        ) from None
    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub raises its own exception types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{source!r} is not a file and not available on the Hugging Face hub: {reason}") from None
