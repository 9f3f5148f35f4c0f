"""Labelled grids of images, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dalle2_jax.imaging.text import Font, load_font, text_height, wrap

_PAPER, _INK, _PALE_INK = (255, 255, 255), (32, 33, 36), (95, 99, 104)


def labelled_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    image_labels: Sequence[str] = (),
    scale: int = 1,
) -> np.ndarray:
    """Arranges images in rows on white, with labels.

    Long labels are wrapped, and cut after three lines.

    Args:
        images: uint8 [h, w, 3] each, of one size.
        columns: images in a row.
        row_labels: a text above each row, over its whole width.
        image_labels: a text below each image.
        scale: whole factor by which each image is enlarged.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: no image, no column, or another number of labels.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError("a grid needs one image and one column at least")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels for {rows} rows")
    if image_labels and len(image_labels) != len(images):
        raise ValueError(f"{len(image_labels)} labels for {len(images)} images")
    h, w = (side * scale for side in np.shape(images[0])[:2])
    # Gaps and fonts grow with the images, so that grids of large ones stay legible.
    gap = max(8, w // 16)
    width = columns * (w + gap) + gap
    row_font = load_font(max(13, min(22, w // 8), w // 32), row_labels)
    image_font = load_font(max(11, min(16, w // 10), w // 32), image_labels)
    above = [wrap(label, row_font, width - 2 * gap) for label in row_labels] or [[]] * rows
    below = [wrap(label, image_font, w) for label in image_labels] or [[]] * len(images)
    # A row is as high as its longest label needs.
    longest = [max(below[row * columns : (row + 1) * columns], key=len) for row in range(rows)]
    tops, height = _layout(above, longest, row_font, image_font, h, gap)

    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for lines, (label_top, _) in zip(above, tops, strict=True):
        draw.multiline_text((gap, label_top), "\n".join(lines), fill=_INK, font=row_font)
    for i, image in enumerate(images):
        x, top = gap + (i % columns) * (w + gap), tops[i // columns][1]
        enlarged = Image.fromarray(np.asarray(image)).resize((w, h), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (x, top))
        text = "\n".join(below[i])
        draw.multiline_text((x, top + h + 2), text, fill=_PALE_INK, font=image_font)
    return np.asarray(canvas)


def _layout(
    above: Sequence[list[str]],
    below: Sequence[list[str]],
    row_font: Font,
    image_font: Font,
    image_height: int,
    gap: int,
) -> tuple[list[tuple[int, int]], int]:
    """Returns (top of the label, top of the images) of each row, and the height of the grid.

    `above` and `below` are the lines of text over and under each row.
    """
    tops = []
    y = gap
    for row_lines, image_lines in zip(above, below, strict=True):
        top = y + text_height(row_lines, row_font) + (gap // 2 if row_lines else 0)
        tops.append((y, top))
        y = top + image_height + text_height(image_lines, image_font) + gap
    return tops, y
