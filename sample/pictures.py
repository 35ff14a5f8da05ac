"""Pictures of samples: contact sheets with captions."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (32, 33, 36)
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"  # has the sign ▯ of a hidden character


def contact_sheet(
    pictures: np.ndarray, captions: list[str] | None = None, columns: int = 8, size: int = 80
) -> Image.Image:
    """One picture of all pictures (N, S, S, C) uint8, enlarged to `size` pixels, each above its caption."""
    font = ImageFont.truetype(str(FONT), 10)
    captions = captions or [""] * len(pictures)
    width = max([size, *(int(font.getlength(c)) + 4 for c in captions)])
    height = size + (18 if any(captions) else 0)
    gap, columns = 8, max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        sheet.paste(enlarge(pixels, size), (x + (width - size) // 2, y))
        draw.text((x + width // 2, y + size + 3), caption, INK, font=font, anchor="ma")
    return sheet


def enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    """(S, S, C) uint8, one or three channels → an RGB picture of size × size with hard pixels."""
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
    return picture.resize((size, size), Image.Resampling.NEAREST)
