"""Charts of a real and a synthetic table: an SVG per column, and maps of association as PNG inside SVG."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
import pandas as pd
from PIL import Image

from .columns import Roles, codes, numbers
from .metrics import correlations

REAL, SYNTH = "#9aa0a6", "#1a73e8"
BARS = 30  # of a histogram; a numerical column with fewer values gets a bar per value
LEVELS = 10  # categories shown by name; the rest are one bar
WIDTH, HEIGHT = 380, 150
MAP_ROWS = 20_000  # rows that associations are computed from, at most
MAP_LABELS = 40  # columns up to which a map shows their names


def marginal(real: pd.Series, synth: pd.Series, numerical: bool) -> str:
    """Shares of real rows (grey) and synthetic rows (blue), missing values as a bar of their own."""
    return _histogram(real, synth) if numerical else _bars(real, synth)


def _histogram(real: pd.Series, synth: pd.Series) -> str:
    tables = numbers(real), numbers(synth)
    missing = [float(np.isnan(v).mean()) for v in tables]
    present = [v[~np.isnan(v)] for v in tables]
    if not any(map(len, present)):
        return _svg(_text(WIDTH / 2, HEIGHT / 2, "every value is missing", "middle"), "every value is missing")
    counts, low, high, note = _counts(*present)
    ends = [_number(low, real), _number(high, real)]
    shares = [c / max(len(v), 1) for c, v in zip(counts, tables, strict=True)]
    if any(missing):
        shares = [np.append(s, [0.0, m]) for s, m in zip(shares, missing, strict=True)]
    top = max(s.max() for s in shares)
    step, base, parts = (WIDTH - 10) / len(shares[0]), HEIGHT - 22, []
    for i, (x, y) in enumerate(zip(*shares, strict=True)):
        left, heights = 5 + i * step, [(base - 16) * v / top for v in (x, y)]
        parts.append(_rect(left + 0.08 * step, base - heights[0], 0.84 * step, heights[0], REAL, 0.75))
        parts.append(_rect(left + 0.3 * step, base - heights[1], 0.4 * step, heights[1], SYNTH))
    parts.append(f'<line x1="5" x2="{WIDTH - 5}" y1="{base}" y2="{base}" stroke="#bdc1c6"/>')
    right = WIDTH - 5 - (2 * step if any(missing) else 0)
    parts += [_text(5, HEIGHT - 8, ends[0]), _text(right, HEIGHT - 8, ends[1], "end")]
    if any(missing):
        parts.append(_text(WIDTH - 5, HEIGHT - 8, "∅", "end"))
        note = "; ".join(filter(None, [f"∅ missing: {missing[0]:.1%} real, {missing[1]:.1%} synthetic", note]))
    parts.append(_text(WIDTH - 5, 10, note or f"highest bar {top:.1%}", "end"))
    return _svg("".join(parts), "histogram")


def _counts(real: np.ndarray, synth: np.ndarray) -> tuple[list[np.ndarray], float, float, str]:
    """(counts of both tables in each bar, lowest value, highest value, a note on outliers)."""
    both = np.concatenate([real, synth])
    values = np.unique(both)
    if len(values) <= BARS:
        return [np.array([(v == x).sum() for x in values]) for v in (real, synth)], values[0], values[-1], ""
    low, high = np.quantile(both, [0.005, 0.995])
    if low < high < low + 0.5 * (values[-1] - values[0]):
        note = "the outermost bars include all values beyond them"
    else:
        low, high, note = values[0], values[-1], ""
    edges = np.linspace(low, high, BARS + 1)
    return [np.histogram(np.clip(v, low, high), edges)[0] for v in (real, synth)], low, high, note


def _bars(real: pd.Series, synth: pd.Series) -> str:
    found = codes(real, synth)
    counts = [np.bincount(c + 1, minlength=len(found.levels) + 1) / max(len(c), 1) for c in found.codes]
    order = np.argsort(-(counts[0] + counts[1])[1:], kind="stable") + 1
    rows = [(found.levels[i - 1], counts[0][i], counts[1][i]) for i in order[:LEVELS]]
    rest = order[LEVELS:]
    if len(rest):
        rows.append((f"{len(rest)} others", counts[0][rest].sum(), counts[1][rest].sum()))
    if counts[0][0] or counts[1][0]:
        rows.append(("∅ missing", counts[0][0], counts[1][0]))
    top = max([max(x, y) for _, x, y in rows], default=0) or 1.0
    parts, room, pitch = [], WIDTH - 130 - 100, 17
    for i, (name, x, y) in enumerate(rows):
        y0 = 4 + i * pitch
        parts.append(_text(124, y0 + 10, name if len(name) <= 20 else name[:19] + "…", "end"))
        parts.append(_rect(130, y0, room * x / top, 6, REAL) + _rect(130, y0 + 6, room * y / top, 6, SYNTH))
        parts.append(_text(WIDTH - 2, y0 + 10, f"{x:.1%} · {y:.1%}", "end"))
    return _svg("".join(parts), "shares of categories", 8 + pitch * len(rows))


def associations(table: pd.DataFrame, roles: Roles, columns: list[str], seed: int = 0) -> np.ndarray:
    """(C, C): Pearson's r of two numerical columns, Cramér's V of two categorical ones, correlation ratio η of one of
    each; NaN where a column does not vary."""
    if len(table) > MAP_ROWS:
        table = table.iloc[np.random.default_rng(seed).permutation(len(table))[:MAP_ROWS]]
    values = {c: numbers(table[c]) for c in columns if c in roles.numerical}
    levels = {c: codes(table[c]).codes[0] + 1 for c in columns if c not in values}
    result = np.full((len(columns), len(columns)), np.nan)
    index = [columns.index(c) for c in values]
    result[np.ix_(index, index)] = correlations(values)
    for j, b in enumerate(columns):
        for i, a in enumerate(columns[: j + 1]):
            if a in levels and b in levels:
                result[i, j] = result[j, i] = _cramer(levels[a], levels[b])
            elif a in levels or b in levels:
                number, level = (a, b) if a in values else (b, a)
                result[i, j] = result[j, i] = _ratio(values[number], levels[level])
    return result


def _cramer(a: np.ndarray, b: np.ndarray) -> float:
    """Cramér's V of two columns of codes."""
    a, b = (np.unique(v, return_inverse=True)[1] for v in (a, b))
    shape = (int(a.max()) + 1, int(b.max()) + 1)
    if min(shape) < 2:
        return float("nan")
    cells, counts = np.unique(a.astype(np.int64) * shape[1] + b, return_counts=True)
    rows, sides = np.bincount(a), np.bincount(b)
    expected = rows[cells // shape[1]] * sides[cells % shape[1]] / len(a)
    chi2 = (counts**2 / expected).sum() - len(a)
    return float(np.sqrt(max(chi2, 0.0) / (len(a) * (min(shape) - 1))))


def _ratio(value: np.ndarray, level: np.ndarray) -> float:
    """The correlation ratio η of numbers and codes."""
    present = ~np.isnan(value)
    value, level = value[present], np.unique(level[present], return_inverse=True)[1]
    if not len(value) or np.ptp(value) == 0 or level.max() == 0:
        return float("nan")
    value = value - value.mean()
    sizes = np.bincount(level)
    between = (np.bincount(level, value) ** 2 / sizes).sum()
    return float(np.sqrt(min(between / (value**2).sum(), 1.0)))


def association_map(matrix: np.ndarray, columns: list[str], title: str, scale: float) -> str:
    """A square per pair of columns: blue for +scale, white for 0, red for −scale, grey for NaN."""
    shown = np.clip(np.nan_to_num(matrix) / scale, -1, 1)[..., None]
    blue, red, white = (np.array(c, float) for c in ((26, 115, 232), (217, 48, 37), (255, 255, 255)))
    colours = np.where(shown > 0, white + shown * (blue - white), white - shown * (red - white))
    colours[np.isnan(matrix)] = 225
    buffer = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    labelled, size = len(columns) <= MAP_LABELS, 260
    left = 105 if labelled else 4
    cell = size / max(len(columns), 1)
    parts = [
        f'<image x="{left}" y="4" width="{size}" height="{size}" style="image-rendering:pixelated" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        f'<rect x="{left}" y="4" width="{size}" height="{size}" fill="none" stroke="#dadce0"/>'
    ]
    if labelled:
        small = min(11.0, cell * 0.85)
        for i, name in enumerate(columns):
            label = name if len(name) <= 16 else name[:15] + "…"
            middle = 4 + (i + 0.5) * cell + small * 0.35
            parts.append(_text(left - 4, middle, label, "end", small))
            x = left + (i + 0.5) * cell + small * 0.35
            parts.append(_text(x, size + 10, label, "end", small, f'transform="rotate(-90 {x:.1f} {size + 10})"'))
    return _svg("".join(parts), title, size + (110 if labelled else 8), left + size + 4)


def _number(value: float, column: pd.Series) -> str:
    if pd.api.types.is_datetime64_any_dtype(column):
        return str(pd.Timestamp(value, unit="s").date())
    whole = abs(value) >= 1e4 or float(value).is_integer()
    return f"{value:,.0f}" if whole and abs(value) < 1e12 else f"{value:.4g}"


def _rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    if width <= 0 or height <= 0:
        return ""
    faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{faint}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: float = 10.5, more: str = "") -> str:
    text = "".join(c if c.isprintable() else "�" for c in text)
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:.1f}" fill="#5f6368" {more}>'
        f"{escape(text)}</text>"
    )


def _svg(body: str, label: str, height: float = HEIGHT, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'font-family="system-ui, sans-serif">{body}</svg>'
    )
