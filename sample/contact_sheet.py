"""Contact sheets: a grid of samples, each with its images side by side above its texts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (32, 33, 36)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"  # has the glyph ▯ of a masked position
GAP = 8  # pixels between cells, and between the images of a cell
LINE = 12  # pixels per line of a text
MAX_LINES = 6  # of a text
TEXT_WIDTH = 320  # pixels of a text without images
WIDEST = 4  # times its height, an image

Shown: TypeAlias = Image.Image | str  # what `Modality.render` returns


def contact_sheet(
    images: np.ndarray, captions: list[str] | None = None, columns: int = 8, size: int = 80
) -> Image.Image:
    """The sheet of images (N, S, S, C) uint8, each above its caption."""
    shown = [Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels) for pixels in images]
    texts = captions or [""] * len(shown)
    return sheet_of(list(zip(shown, texts, strict=True)), columns, size)


def sheet_of(samples: Sequence[Sequence[Shown]], columns: int = 8, size: int = 80) -> Image.Image:
    """A grid of samples, each of them images and texts; images are scaled to a height of `size` pixels.

    If an image is larger than `size`, all are shown at twice that. Texts are wrapped to the width of two images and
    truncated after six lines.

    columns: of samples with one image each; samples of several images, or of text alone, get fewer.
    """
    font = ImageFont.truetype(str(FONT), 10, layout_engine=ImageFont.Layout.BASIC)
    pictures = [[part for part in sample if isinstance(part, Image.Image)] for sample in samples]
    size = 2 * size if any(image.height > size for row in pictures for image in row) else size
    pictures = [[enlarge(image, size) for image in row] for row in pictures]
    across = max(_width(row) for row in pictures)
    characters = int((max(2 * size, across) if across else TEXT_WIDTH) / font.getlength("x"))
    texts = [[part for part in sample if isinstance(part, str)] for sample in samples]
    wrapped = [[line for text in row for line in _wrap(text, characters)] for row in texts]
    width = max([across, *(int(font.getlength(line)) + 4 for lines in wrapped for line in lines)])
    most_lines = max(len(lines) for lines in wrapped)
    top = size if across else 0
    height = top + (6 + LINE * most_lines if most_lines else 0)
    wide = max(len(row) for row in pictures) or 2  # a sample of two images, or of text alone, is two cells wide
    columns = max(1, min(columns // wide, len(samples)))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (row, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        left = x + (width - _width(row)) // 2
        for image in row:
            sheet.paste(image, (left, y))
            left += image.width + GAP
        for k, line in enumerate(lines):
            draw.text((x + width // 2, y + top + 3 + LINE * k), line, INK, font=font, anchor="ma")
    return sheet


def _width(row: Sequence[Image.Image]) -> int:
    """Of images side by side."""
    return sum(image.width + GAP for image in row) - GAP if row else 0


def _wrap(text: str, characters: int) -> list[str]:
    """A text wrapped to lines of at most `characters`; if there are too many lines, the last one ends in …"""
    printable = "".join(c if c.isprintable() else "·" for c in text)  # early models generate arbitrary bytes
    lines = textwrap.wrap(printable, characters)
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: characters - 1] + "…"]


def enlarge(image: Image.Image, height: int) -> Image.Image:
    """An image in RGB, scaled to a height.

    Nearest-neighbour interpolation where it is enlarged, a box filter where it is reduced.
    """
    width = min(max(1, round(height * image.width / image.height)), WIDEST * height)
    how = Image.Resampling.NEAREST if height >= image.height else Image.Resampling.BOX
    return image.convert("RGB").resize((width, height), how)
