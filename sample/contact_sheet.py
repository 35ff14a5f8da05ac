"""Pictures of samples: contact sheets with captions."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (32, 33, 36)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"  # has the sign ▯ of a hidden character


def contact_sheet(
    pictures: np.ndarray, captions: list[str] | None = None, columns: int = 8, size: int = 80
) -> Image.Image:
    """One picture of all pictures (N, S, S, C) uint8, brought to `size` pixels, each above its caption.

    Larger pictures are shown at twice that. A caption is broken into lines as wide as two pictures and cut after six.
    """
    font = ImageFont.truetype(str(FONT), 10, layout_engine=ImageFont.Layout.BASIC)
    size = size if pictures.shape[1] <= size else 2 * size
    lines = [_lines(caption, int(2 * size / font.getlength("x"))) for caption in captions or [""] * len(pictures)]
    width = max([size, *(int(font.getlength(line)) + 4 for caption in lines for line in caption)])
    tallest = max(len(caption) for caption in lines)
    height = size + (tallest and 6 + 12 * tallest)
    gap, columns = 8, max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, caption) in enumerate(zip(pictures, lines, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        sheet.paste(enlarge(pixels, size), (x + (width - size) // 2, y))
        for k, line in enumerate(caption):
            draw.text((x + width // 2, y + size + 3 + 12 * k), line, INK, font=font, anchor="ma")
    return sheet


def _lines(caption: str, characters: int) -> list[str]:
    """A caption broken into lines of at most so many characters, the sixth ending in … if there is more."""
    printable = "".join(c if c.isprintable() else "·" for c in caption)  # half-trained tokenizers put out any bytes
    lines = textwrap.wrap(printable, characters)
    return lines if len(lines) <= 6 else [*lines[:5], lines[5][: characters - 1] + "…"]


def enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    """(S, S, C) uint8, one or three channels → an RGB picture of size × size; small ones get hard pixels."""
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return picture.resize((size, size), Image.Resampling.NEAREST if size >= len(pixels) else Image.Resampling.BOX)
