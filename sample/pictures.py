"""Pictures of samples: contact sheets with captions."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (32, 33, 36)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"  # has the sign ▯ of a hidden character


LETTERS, LINE = 24, 13  # of a caption's line: most letters, pixels high


def contact_sheet(
    pictures: np.ndarray, captions: list[str] | None = None, columns: int = 8, size: int = 80
) -> Image.Image:
    """One picture of all pictures (N, S, S, C) uint8, enlarged to `size` pixels, each above its caption."""
    font = ImageFont.truetype(str(FONT), 10, layout_engine=ImageFont.Layout.BASIC)
    wrapped = [textwrap.wrap(_printable(c), LETTERS) for c in captions or [""] * len(pictures)]
    width = max([size, *(int(font.getlength(line)) + 4 for lines in wrapped for line in lines)])
    height = size + 5 + LINE * max(map(len, wrapped), default=0)
    gap, columns = 8, max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        sheet.paste(enlarge(pixels, size), (x + (width - size) // 2, y))
        for k, line in enumerate(lines):
            draw.text((x + width // 2, y + size + 3 + k * LINE), line, INK, font=font, anchor="ma")
    return sheet


def _printable(caption: str) -> str:
    """Bytes that a half-trained tokenizer puts out are no characters a font could draw."""
    return "".join(c if c.isprintable() else "·" for c in caption)


def enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    """(S, S, C) uint8, one or three channels → an RGB picture of size × size with hard pixels."""
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return picture.resize((size, size), Image.Resampling.NEAREST)
