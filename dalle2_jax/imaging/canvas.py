"""Canvases for editing: the square that a model generates, and ones larger than its images.

A model generates squares of one size. Inpainting takes the centre square of an image
(`fit_square`). Outpainting puts the image on a larger canvas (`extend`), which is then generated
frame by frame: a frame is a window of the model's size, part of which is known already, from the
image or from former frames (`frames`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.imaging.crops import crop_resize
from dalle2_jax.imaging.decode import MAX_PIXELS

Window = tuple[slice, slice]
"""Rows and columns of a canvas."""
_STRIDES_PER_SIDE = 8
"""Frames start at multiples of their side divided by this."""


def fit_square(
    image: np.ndarray, edit_mask: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centre squares of an image and its mask at `size`.

    Args:
        image: uint8 [h, w, 3].
        edit_mask: bool [h, w], True where pixels are to be regenerated.
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3] and bool [size, size]; a pixel of the mask is True if any that it
        covers is.

    Raises:
        UserError: the mask is True nowhere in the centre square.
    """
    side = min(edit_mask.shape)
    top, left = ((n - side) // 2 for n in edit_mask.shape)
    square = slice(top, top + side), slice(left, left + side)
    if not edit_mask[square].any():
        raise UserError(
            f"the mask marks nothing of the middle {side} x {side} pixels, which alone are "
            "generated: cut the image to a square around what is marked"
        )
    # The mean over each new pixel's area is positive if any pixel in it is marked.
    shares = Image.fromarray(edit_mask[square].astype(np.float32))
    small_mask = np.asarray(shares.resize((size, size), Image.Resampling.BOX)) > 0
    return crop_resize(image[square], size), small_mask


def extend(
    image: np.ndarray, margins: Sequence[int], least: int
) -> tuple[np.ndarray, np.ndarray, Window]:
    """Returns a canvas with the image and margins around it.

    Args:
        image: uint8 [h, w, 3].
        margins: pixels to add on the left, on the right, above and below.
        least: a smaller side of the canvas gets further margins, up to this size in pixels.

    Returns:
        canvas: uint8 [height, width, 3], white around the image.
        known_mask: bool [height, width], True where the image is.
        window: the part of the canvas with the margins that were asked for, and no further ones.

    Raises:
        UserError: a canvas of more than MAX_PIXELS.
    """
    left, right, up, down = margins
    h, w = image.shape[:2]
    height, width = up + h + down, left + w + right
    spare_y, spare_x = max(least - height, 0), max(least - width, 0)
    if (height + spare_y) * (width + spare_x) > MAX_PIXELS:
        raise UserError(
            f"the canvas would be {width} x {height}: at most {MAX_PIXELS // 10**6} million pixels "
            "can be generated"
        )
    y, x = spare_y // 2, spare_x // 2
    window = slice(y, y + height), slice(x, x + width)
    place = slice(y + up, y + up + h), slice(x + left, x + left + w)
    canvas = np.full((height + spare_y, width + spare_x, 3), 255, np.uint8)
    known_mask = np.zeros(canvas.shape[:2], bool)
    canvas[place] = image
    known_mask[place] = True
    return canvas, known_mask, window


def estimate_frames(shape: Sequence[int], margins: Sequence[int], size: int) -> int:
    """Returns about how many frames extend an image [h, w, ...], if each is half known before."""
    left, right, up, down = margins
    h, w = shape[:2]
    return round(2 * ((up + h + down) * (left + w + right) - h * w) / size**2)


def frames(known_mask: np.ndarray, size: int, overlap: float) -> Iterator[Window]:
    """Yields the windows that are generated, in order, until the whole canvas is known.

    Every window is the best that is left, by these rules in turn:

    1. Its generated pixels have no known neighbour outside of it. The network would not see that
       neighbour, and nothing would smooth the seam.
    2. At least `overlap` of it is known, so that the frame continues what is there. Of these
       windows, the one with the most to generate comes first; if there is none, the one with the
       most that is known.

    Args:
        known_mask: bool [h, w], True where the canvas is known at the start; somewhere it is.
        size: side of a window in pixels.
        overlap: 0 to 1.
    """
    known_mask = known_mask.copy()
    stride = max(1, size // _STRIDES_PER_SIDE)
    tops, lefts = (sorted({*range(0, n - size + 1, stride), n - size}) for n in known_mask.shape)
    rows, columns = np.array(tops)[:, None], np.array(lefts)[None]
    while not known_mask.all():
        # Sums over all windows at once, as differences of the integral image (summed-area table).
        total = np.pad(known_mask.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        upper = total[rows, columns + size] - total[rows, columns]
        lower = total[rows + size, columns + size] - total[rows + size, columns]
        share = (lower - upper) / size**2  # of each window that is known
        # The lowest rank comes first: `share` is below 1, the others above it, by rule 2.
        rank = np.where(share >= overlap, share, 2 - share)
        unseen = _unseen_neighbours(known_mask, rows, columns, size)
        rank += np.where(unseen > 0, 4 + unseen / size, 0)  # rule 1: behind all that have none
        rank = np.where(share == 1, np.inf, rank)  # nothing to generate
        i, j = np.unravel_index(rank.argmin(), rank.shape)
        window = slice(tops[i], tops[i] + size), slice(lefts[j], lefts[j] + size)
        known_mask[window] = True
        yield window


def _unseen_neighbours(
    known_mask: np.ndarray, top: np.ndarray, left: np.ndarray, size: int
) -> np.ndarray:
    """Counts, for each window, unknown pixels along its sides with a known neighbour outside.

    Windows start at top [n, 1] and left [1, m] -> int [n, m].
    """
    around = np.pad(known_mask, 1, mode="edge")
    rows, columns = top[:, 0], left[0]
    last_rows, last_columns = rows + size - 1, columns + size - 1
    # Along the first and last row of the windows, every pixel of the canvas's row: [n, width].
    above = _running_sums(~known_mask[rows] & around[rows, 1:-1], 1)
    below = _running_sums(~known_mask[last_rows] & around[last_rows + 2, 1:-1], 1)
    # Along their first and last column: [height, m].
    before = _running_sums(~known_mask[:, columns] & around[1:-1, columns], 0)
    behind = _running_sums(~known_mask[:, last_columns] & around[1:-1, last_columns + 2], 0)
    horizontal, vertical = above + below, before + behind
    return (
        horizontal[:, columns + size]
        - horizontal[:, columns]
        + vertical[rows + size]
        - vertical[rows]
    )


def _running_sums(lines: np.ndarray, axis: int) -> np.ndarray:
    """Returns the sums of the first 0, 1, ... n values of bool `lines` along an axis, int."""
    return np.insert(lines.cumsum(axis=axis), 0, 0, axis=axis)
