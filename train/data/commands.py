"""`anystate data …`: pack raw data of any modalities into a data set, and check one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ...configs.options import CLIP_MODEL, VAE, VAE_SCALE, Device, require_path

if TYPE_CHECKING:
    from ...configs.config import Config
    from .packed.manifest import Manifest
    from .packing.sources import DatasetSource

app = typer.Typer(help="Pack data of any modalities for training; check a packed data set.", no_args_is_help=True)
console = Console()


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Images with captions: an .npz, a folder, .parquet or .arrow, a list of links, a hub id. "
            "With --config: whatever data.source may be."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the data set; the same folder resumes.")],
    config: Annotated[
        str | None,
        typer.Option(help="Config whose modalities are packed; default images and captions, as the options say."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels; default that of the first image.")
    ] = None,
    channels: Annotated[int, typer.Option(help="Channels of the images: 1, 3 or 4.")] = 3,
    latents: Annotated[bool, typer.Option("--latents", help="Store latents of an autoencoder, not pixels.")] = False,
    vae: Annotated[str, typer.Option(help="Autoencoder: folder or hub id.")] = VAE,
    scale: Annotated[float, typer.Option(help="Factor that gives its latents about unit variance.")] = VAE_SCALE,
    text: Annotated[
        Literal["characters", "bpe", "clip"], typer.Option(help="Tokenizer; bpe is byte-level and trained here.")
    ] = "characters",
    states: Annotated[int, typer.Option(help="Vocabulary of bpe, at most.")] = 1024,
    tokenizer: Annotated[str, typer.Option(help="CLIP tokenizer: file, folder or hub id.")] = CLIP_MODEL,
    alphabet: Annotated[str | None, typer.Option(help="Allowed characters; default those of the captions.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens per caption; default fits the longest.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 4096,
    test_share: Annotated[
        float | None,
        typer.Option(help="Share held out where the source has no split; default 0, or the config's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the order and of that split; default 0, or the config's.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="For a list of links: table of keys and captions, or hub id.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Image column of a table; default a usual name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Caption column of a table; default a usual name.")] = None,
    bad_share: Annotated[float, typer.Option(help="Stop when a larger share of the samples cannot be read.")] = 0.01,
    device: Device = None,
) -> None:
    """Make a packed data set; under torchrun the ranks share the work. The same command resumes an interrupted one."""
    from ...configs.locate import is_hub_id, locate, not_found

    if not 0.0 <= (test_share or 0.0) < 1.0 or not 0.0 <= bad_share <= 1.0:
        raise ValueError("--test-share and --bad-share are shares, from 0 to 1")
    if config is None and locate(source) is None and not is_hub_id(source):
        raise ValueError(not_found("source", source))
    from .packing.image_text import Settings
    from .packing.open import open_source
    from .packing.pack import pack

    settings = Settings(
        size=size or (256 if latents else None),
        channels=3 if latents else channels,
        vae=vae if latents else None,
        scale=scale,
        text=text,
        states=states,
        tokenizer=tokenizer,
        alphabet=alphabet,
        length=length,
        shard_size=shard_size,
        test_share=test_share or 0.0,
        seed=seed or 0,
    )
    if config is None:
        raw = open_source(source, captions, image_column, caption_column)
        show(pack(raw, out, settings, bad_share, console, device))
        return
    own = dataclasses.replace(settings, shard_size=4096, test_share=0.0, seed=0)
    if own != Settings(tokenizer=CLIP_MODEL) or captions or image_column or caption_column:
        raise ValueError("--config says what is packed: leave out the options for images and captions")
    read, data = open_config(config, source, {"test_share": test_share, "split_seed": seed})
    settings = Settings(shard_size=shard_size, test_share=read.data.test_share, seed=read.data.split_seed)
    show(pack(data, out, settings, bad_share, console, device, read))


def open_config(config: str, source: str, split: dict[str, Any]) -> tuple[Config, DatasetSource]:
    """A config with this data source, and that data; `split` has settings of the split, where not None."""
    from ...configs.config import Data
    from ...configs.load import load_config
    from .load import load_raw
    from .packing.sources import DatasetSource

    read = load_config(config)
    given = {name: value for name, value in split.items() if value is not None}
    data = (read.data or Data(source=source)).model_copy(update={"source": source, **given})
    read = read.model_copy(update={"data": data})
    return read, DatasetSource(source, load_raw(read))


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="A packed data set.")],
) -> None:
    """Read every shard: checksums, indices, shapes, tokens. The first error is printed; exit code 2."""
    require_path("packed data set", dataset)
    from .packing.check import check as run

    show(run(dataset, console))


def show(manifest: Manifest) -> None:
    """Print the contents of a data set, and the lines of a config that fit it."""
    from .packing.check import describe

    for line in describe(manifest):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
