"""Labelled grids of images, for people to look at."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _PALE_INK = (255, 255, 255), (32, 33, 36), (95, 99, 104)
_MAX_LINES = 3


def labelled_grid(
    pictures: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    picture_labels: Sequence[str] = (),
    scale: int = 1,
) -> np.ndarray:
    """Pictures, all of one size, in rows of `columns` on white -> uint8 [height, width, 3].

    A row's label stands above it over the whole width, a picture's below it; long ones are
    wrapped, and cut after three lines. `scale` enlarges each picture a whole number of times.
    """
    if len(pictures) == 0 or columns < 1:
        raise ValueError("a grid needs one picture and one column at least")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels for {rows} rows")
    if picture_labels and len(picture_labels) != len(pictures):
        raise ValueError(f"{len(picture_labels)} labels for {len(pictures)} pictures")
    h, w = (side * scale for side in np.shape(pictures[0])[:2])
    gap = max(8, w // 16)
    width = columns * (w + gap) + gap
    row_font = _font(max(13, min(22, w // 8), w // 32), row_labels)
    small_font = _font(max(11, min(16, w // 10), w // 32), picture_labels)
    above = [_wrap(label, row_font, width - 2 * gap) for label in row_labels] or [[]] * rows
    below = [_wrap(label, small_font, w) for label in picture_labels] or [[]] * len(pictures)

    places: list[tuple[int, int]] = []  # (top of the row's label, top of its pictures)
    y = gap
    for row in range(rows):
        top = y + _height(above[row], row_font) + (gap // 2 if above[row] else 0)
        places.append((y, top))
        lines = max(below[row * columns : (row + 1) * columns], key=len)
        y = top + h + _height(lines, small_font) + gap

    canvas = Image.new("RGB", (width, y), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (label_top, _) in enumerate(places):
        draw.multiline_text((gap, label_top), "\n".join(above[row]), fill=_INK, font=row_font)
    for i, picture in enumerate(pictures):
        x, top = gap + (i % columns) * (w + gap), places[i // columns][1]
        image = Image.fromarray(np.asarray(picture))
        canvas.paste(image.resize((w, h), Image.Resampling.NEAREST), (x, top))
        text = "\n".join(below[i])
        draw.multiline_text((x, top + h + 2), text, fill=_PALE_INK, font=small_font)
    return np.asarray(canvas)


def _font(size: int, texts: Sequence[str]) -> Any:
    """Pillow's own font, which is the same everywhere, or a system's where a text needs more."""
    if not all(text.isascii() for text in texts):
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _height(lines: Sequence[str], font: Any) -> int:
    """Pixels that `multiline_text` needs for these lines, a little air included."""
    if not lines:
        return 0
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(draw.multiline_textbbox((0, 0), "\n".join(["Åg"] * len(lines)), font=font)[3]) + 4


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Words into at most three lines of `width` pixels; a word too wide is broken."""
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1 and len(lines) <= _MAX_LINES:
            fits = next(
                n for n in range(len(word), 0, -1) if n == 1 or _fits(word[:n], font, width)
            )
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and not _fits(last + "…", font, width):
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], last + "…"]
    return lines


def _fits(text: str, font: Any, width: int) -> bool:
    return font.getlength(text) <= width
