"""Contact sheets: a grid of images with captions."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (32, 33, 36)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"  # has the glyph ▯ of a masked position
GAP = 8  # pixels between cells
LINE = 12  # pixels per line of a caption
MAX_LINES = 6


def contact_sheet(
    images: np.ndarray, captions: list[str] | None = None, columns: int = 8, size: int = 80
) -> Image.Image:
    """A grid of images (N, S, S, C) uint8, each resized to `size` pixels and shown above its caption.

    Images larger than `size` are shown at twice that. Captions are wrapped to the width of two images and truncated
    after six lines.
    """
    font = ImageFont.truetype(str(FONT), 10, layout_engine=ImageFont.Layout.BASIC)
    size = size if images.shape[1] <= size else 2 * size
    characters = int(2 * size / font.getlength("x"))
    wrapped = [_wrap(caption, characters) for caption in captions or [""] * len(images)]
    width = max([size, *(int(font.getlength(line)) + 4 for lines in wrapped for line in lines)])
    most_lines = max(len(lines) for lines in wrapped)
    height = size + (6 + LINE * most_lines if most_lines else 0)
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        sheet.paste(enlarge(pixels, size), (x + (width - size) // 2, y))
        for k, line in enumerate(lines):
            draw.text((x + width // 2, y + size + 3 + LINE * k), line, INK, font=font, anchor="ma")
    return sheet


def _wrap(caption: str, characters: int) -> list[str]:
    """A caption wrapped to lines of at most `characters`; if there are too many lines, the last one ends in …"""
    printable = "".join(c if c.isprintable() else "·" for c in caption)  # early models generate arbitrary bytes
    lines = textwrap.wrap(printable, characters)
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: characters - 1] + "…"]


def enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    """(S, S, C) uint8 with one or three channels as an RGB image of size × size.

    Nearest-neighbour interpolation where it is enlarged, a box filter where it is reduced.
    """
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return image.resize((size, size), Image.Resampling.NEAREST if size >= len(pixels) else Image.Resampling.BOX)
