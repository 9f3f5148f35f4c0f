"""Seams between what was kept of a picture and what was drawn beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def masks(size: int) -> Mapping[str, np.ndarray]:
    """Parts to draw anew, bool [size, size]."""
    place = (np.arange(size) + 0.5) / size
    middle = (place > 0.25) & (place < 0.75)
    everywhere = np.ones(size, bool)
    return {
        "middle": middle[:, None] & middle[None],
        "right half": everywhere[:, None] & (place > 0.5)[None],
        "all but the middle": ~(middle[:, None] & middle[None]),
    }


def across(pictures: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean difference of two neighbouring pixels of uint8 [n, h, w, 3], in 255ths: over the edge of
    bool [h, w], and of all others within a 16th of the side from it."""
    from scipy import ndimage

    x = pictures.astype(np.float64)
    reach = max(1, mask.shape[0] // 16)
    grown = ndimage.binary_dilation(mask, iterations=reach)
    shrunk: Any = ndimage.binary_erosion(mask, iterations=reach, border_value=1)
    near = grown & ~shrunk
    over, within = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(x, axis=axis + 1)).mean(axis=(0, -1))
        a, b = (np.take(mask, range(start, mask.shape[axis] - 1 + start), axis) for start in (0, 1))
        close = np.take(near, range(mask.shape[axis] - 1), axis)
        over.append(step[a != b])
        within.append(step[(a == b) & close])
    return float(np.concatenate(over).mean()), float(np.concatenate(within).mean())


def to_markdown(lines: Sequence[tuple[str, *tuple[tuple[float, float], ...]]]) -> str:
    """A table of names and `across` of what was drawn, of that without a feather, and of the true
    pictures."""
    rows = [
        "| | over the seam | beside it | without feather | beside | true pictures | beside |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {' | '.join(f'{value:.1f}' for pair in told for value in pair)} |"
        for name, *told in lines
    ]
    return "\n".join(rows) + "\n"
