"""Text on images: fonts, and words wrapped into lines."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Font = Any  # Pillow's fonts have no class in common
MAX_LINES = 3
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")


def load_font(size: int, texts: Sequence[str]) -> Font:
    """Returns a font for `texts`: Pillow's own, or one of the system if they are not all ASCII.

    Pillow's looks the same on every machine, but has few characters.
    """
    if not all(text.isascii() for text in texts):
        for name in _SYSTEM_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def text_height(lines: Sequence[str], font: Font) -> int:
    """Returns the height in pixels of lines, with a margin below; 0 for none."""
    if not lines:
        return 0
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    tallest = "\n".join(["Åg"] * len(lines))  # the same for all texts of so many lines
    return int(draw.multiline_textbbox((0, 0), tallest, font=font)[3]) + 4


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Returns the words of `text` in at most `MAX_LINES` lines of `width` pixels.

    A word that is wider is broken. A text that is longer ends in "…".
    """
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if _fits(joined, font, width):
            line = joined
            continue
        if line:
            lines.append(line)
        while not _fits(word, font, width) and len(word) > 1 and len(lines) <= MAX_LINES:
            length = _fitting_length(word, font, width)
            lines.append(word[:length])
            word = word[length:]
        line = word
    if line:
        lines.append(line)
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and not _fits(last + "…", font, width):
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last + "…"]
    return lines


def _fitting_length(word: str, font: Font, width: int) -> int:
    """Returns how many characters of a word fit into `width`, at least 1."""
    lengths = range(len(word), 1, -1)
    return next((n for n in lengths if _fits(word[:n], font, width)), 1)


def _fits(text: str, font: Font, width: int) -> bool:
    return font.getlength(text) <= width
