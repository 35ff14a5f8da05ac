"""`anystate data …`: from raw pairs to a packed data set, and a look into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Pack pictures and captions for training; check what was packed.", no_args_is_help=True)
console = Console()


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="An .npz; a folder of pictures with captions; .parquet or .arrow; a list of links; a hub id."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the data set; the same folder goes on where it stopped.")],
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; default the first one's.")] = None,
    channels: Annotated[int, typer.Option(help="Channels of the pictures: 1, 3 or 4.")] = 3,
    latents: Annotated[bool, typer.Option("--latents", help="Store latents of an autoencoder, not pixels.")] = False,
    vae: Annotated[str, typer.Option(help="The autoencoder: folder or hub id.")] = "stabilityai/sd-vae-ft-mse",
    scale: Annotated[float, typer.Option(help="Factor that gives its latents about unit variance.")] = 0.18215,
    text: Annotated[str, typer.Option(help="characters, bpe (byte-level, trained here) or clip.")] = "characters",
    states: Annotated[int, typer.Option(help="Vocabulary of bpe, at most.")] = 1024,
    tokenizer: Annotated[
        str, typer.Option(help="The CLIP tokenizer: file, folder or hub id.")
    ] = "openai/clip-vit-large-patch14",
    alphabet: Annotated[str | None, typer.Option(help="Characters allowed; default those of the captions.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per caption; default fits the longest.")] = None,
    shard_size: Annotated[int, typer.Option(help="Samples per shard.")] = 4096,
    test_share: Annotated[float, typer.Option(help="Share held out where the source has no split.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the order and of that split.")] = 0,
    captions: Annotated[
        str | None, typer.Option(help="Of a list of links: table of keys and captions, or hub id.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table; default a usual name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of a table; default a usual name.")] = None,
    bad_share: Annotated[float, typer.Option(help="Stop when a larger share of the samples cannot be used.")] = 0.01,
    device: Annotated[str | None, typer.Option(help="Where the autoencoder works; default a GPU if any.")] = None,
) -> None:
    """Make a packed data set; under torchrun the ranks share the work. Run again, only what is missing is done."""
    from .packing.open import open_source
    from .packing.pack import Settings, pack

    if not 0.0 <= test_share < 1.0 or not 0.0 <= bad_share <= 1.0:
        raise ValueError("--test-share and --bad-share are shares, from 0 to 1")
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
    manifest = pack(raw, out, settings, bad_share, console, device)
    show(manifest)


@app.command()
def check(dataset: Annotated[Path, typer.Argument(help="A packed data set.")]) -> None:
    """Read every shard: checksums, indices, shapes, tokens. The first fault is named; exit code 2."""
    from .packing.check import check as run

    manifest = run(dataset, console)
    show(manifest)


def show(manifest) -> None:
    """What is in a data set, and the lines of a config that fit it."""
    from .packing.check import describe

    for line in describe(manifest):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
