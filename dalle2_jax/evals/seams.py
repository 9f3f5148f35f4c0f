"""Seams: steps in colour between the kept and the regenerated part of an image.

A visible seam is a step in colour at the edge of the edit mask that is larger than the steps
beside it. Two means of |difference of neighbouring pixels| are compared: over pairs of pixels on
both sides of the edge, and over pairs on one side, close to the edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Steps(NamedTuple):
    """Mean absolute difference of neighbouring pixels, in units of 1/255."""

    across: float  # of pairs that the edge of the mask separates
    beside: float  # of pairs on one side, near the edge


class Seam(NamedTuple):
    """The steps of one edit: as generated, without its feather, and in the true images."""

    name: str
    feathered: Steps
    sharp: Steps
    true: Steps


def edit_masks(size: int) -> Mapping[str, np.ndarray]:
    """Returns the masks of the evaluation, bool [size, size], True where pixels are regenerated."""
    place = (np.arange(size) + 0.5) / size
    middle = (place > 0.25) & (place < 0.75)
    everywhere = np.ones(size, bool)
    return {
        "middle": middle[:, None] & middle[None],
        "right half": everywhere[:, None] & (place > 0.5)[None],
        "all but the middle": ~(middle[:, None] & middle[None]),
    }


def measure(images: np.ndarray, edit_mask: np.ndarray) -> Steps:
    """Measures steps in colour at the edge of a mask.

    Args:
        images: uint8 [n, h, w, 3].
        edit_mask: bool [h, w]. "Near" its edge is within a 16th of the side.
    """
    from scipy import ndimage

    x = images.astype(np.float64)
    reach = max(1, edit_mask.shape[0] // 16)
    grown = ndimage.binary_dilation(edit_mask, iterations=reach)
    shrunk: Any = ndimage.binary_erosion(edit_mask, iterations=reach, border_value=1)
    # A band of `reach` pixels on either side of the edge.
    near = grown & ~shrunk
    across, beside = [], []
    for axis in (0, 1):
        # [h, w], less one along `axis`: the step from each pixel to the next, a mean over all
        # images and colours.
        step = np.abs(np.diff(x, axis=axis + 1)).mean(axis=(0, -1))
        first, second = (
            np.take(edit_mask, range(start, edit_mask.shape[axis] - 1 + start), axis)
            for start in (0, 1)
        )
        close = np.take(near, range(edit_mask.shape[axis] - 1), axis)
        # The mask changes between the two pixels of a pair that lies across its edge.
        across.append(step[first != second])
        beside.append(step[(first == second) & close])
    return Steps(float(np.concatenate(across).mean()), float(np.concatenate(beside).mean()))


def to_markdown(seams: Sequence[Seam]) -> str:
    """Formats the seams as a Markdown table, one line for each edit."""
    lines = [
        "| | across the seam | beside it | without feather | beside it | true images | beside it |",
        "|---|---|---|---|---|---|---|",
    ]
    for seam in seams:
        values = (*seam.feathered, *seam.sharp, *seam.true)
        lines.append(f"| {seam.name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines) + "\n"
