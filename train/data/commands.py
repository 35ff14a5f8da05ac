"""`anystate data …`: pack raw image-text pairs into a data set, and check one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from ...configs.options import CLIP_MODEL, VAE, VAE_SCALE, Device, require_path

if TYPE_CHECKING:
    from .packed.shards import Manifest

app = typer.Typer(help="Pack images and captions for training; check a packed data set.", no_args_is_help=True)
console = Console()


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="An .npz; a folder of images with captions; .parquet or .arrow; a list of links; a hub id."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the data set; the same folder resumes.")],
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
    test_share: Annotated[float, typer.Option(help="Share held out where the source has no split.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the order and of that split.")] = 0,
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

    if not 0.0 <= test_share < 1.0 or not 0.0 <= bad_share <= 1.0:
        raise ValueError("--test-share and --bad-share are shares, from 0 to 1")
    if locate(source) is None and not is_hub_id(source):
        raise ValueError(not_found("source", source))
    from .packing.open import open_source
    from .packing.pack import Settings, pack

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
        test_share=test_share,
        seed=seed,
    )
    raw = open_source(source, captions, image_column, caption_column)
    show(pack(raw, out, settings, bad_share, console, device))


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
