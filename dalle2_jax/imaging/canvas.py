"""A canvas larger than the model's images, generated frame by frame over what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.imaging.decode import MAX_PIXELS, crop_resize

Window = tuple[slice, slice]
_STRIDES = 8  # frames lie at multiples of so small a part of their side


def fitted(picture: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle squares of uint8 [h, w, 3] and of bool [h, w] at `size`; a pixel is masked where
    one that it covers is. UserError: none is, in the middle."""
    side, (top, left) = min(mask.shape), ((n - min(mask.shape)) // 2 for n in mask.shape)
    square = slice(top, top + side), slice(left, left + side)
    if not mask[square].any():
        raise UserError(
            f"the mask marks nothing of the middle {side} x {side} pixels, which alone are drawn: "
            "cut the picture to a square around what is marked"
        )
    marked = Image.fromarray(mask[square].astype(np.float32))
    small = np.asarray(marked.resize((size, size), Image.Resampling.BOX)) > 0
    return crop_resize(picture[square], size, (1.0, 0.5, 0.5)), small


def extended(
    picture: np.ndarray, margins: Sequence[int], least: int
) -> tuple[np.ndarray, np.ndarray, Window]:
    """The picture [h, w, 3] with (left, right, up, down) pixels around it, and further ones where
    that is less than `least` a side.

    Returns the canvas, what of it is known (bool), and the part of it that was asked for. Raises
    UserError for more than MAX_PIXELS.
    """
    left, right, up, down = margins
    h, w = picture.shape[:2]
    height, width = up + h + down, left + w + right
    spare_y, spare_x = max(least - height, 0), max(least - width, 0)
    if (height + spare_y) * (width + spare_x) > MAX_PIXELS:
        most = f"{MAX_PIXELS // 10**6} million pixels"
        raise UserError(f"the canvas would be {width} x {height}: at most {most} can be drawn")
    asked = slice(spare_y // 2, spare_y // 2 + height), slice(spare_x // 2, spare_x // 2 + width)
    canvas = np.full((height + spare_y, width + spare_x, 3), 255, np.uint8)
    known = np.zeros(canvas.shape[:2], bool)
    top, start = asked[0].start + up, asked[1].start + left
    canvas[top : top + h, start : start + w] = picture
    known[top : top + h, start : start + w] = True
    return canvas, known, asked


def estimate(shape: Sequence[int], margins: Sequence[int], size: int) -> int:
    """About how many `frames`, half of them known before, continue a picture [h, w, ...]."""
    left, right, up, down = margins
    h, w = shape[:2]
    return round(2 * ((up + h + down) * (left + w + right) - h * w) / size**2)


def frames(known: np.ndarray, size: int, overlap: float) -> Iterator[Window]:
    """The windows of `size` in which bool [h, w] becomes known all over, each in its turn.

    What a window draws ends beside no pixel that is known but lies outside, unseen, where that can
    be. At least `overlap` of it is known by then, where there is one such; of those, that with the
    most to draw comes first.
    """
    known = known.copy()
    stride = max(1, size // _STRIDES)
    tops, lefts = (sorted({*range(0, n - size + 1, stride), n - size}) for n in known.shape)
    rows, columns = np.array(tops)[:, None], np.array(lefts)[None]
    while not known.all():
        total = np.pad(known.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        ends = total[rows + size, columns + size] - total[rows, columns + size]
        share = (ends - total[rows + size, columns] + total[rows, columns]) / size**2
        rank = np.where(share >= overlap, share, 2 - share)  # the latter: the most known first
        unseen = _beside_unseen(known, rows, columns, size)
        rank += np.where(unseen > 0, 4 + unseen / size, 0)  # 4: after all that have none
        i, j = np.unravel_index(np.where(share == 1, np.inf, rank).argmin(), rank.shape)
        window = slice(tops[i], tops[i] + size), slice(lefts[j], lefts[j] + size)
        known[window] = True
        yield window


def _beside_unseen(known: np.ndarray, top: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """Counts, for each window, edge pixels that are unknown but have a known neighbour outside.

    Windows start at top [n, 1] and left [1, m] -> int [n, m].
    """
    around = np.pad(known, 1, mode="edge")
    rows, columns = top[:, 0], left[0]
    last_rows, last_columns = rows + size - 1, columns + size - 1
    above = _sums(~known[rows] & around[rows, 1:-1], 1)
    below = _sums(~known[last_rows] & around[last_rows + 2, 1:-1], 1)
    before = _sums(~known[:, columns] & around[1:-1, columns], 0)
    behind = _sums(~known[:, last_columns] & around[1:-1, last_columns + 2], 0)
    across = (above + below)[:, columns + size] - (above + below)[:, columns]
    return across + (before + behind)[rows + size] - (before + behind)[rows]


def _sums(lines: np.ndarray, axis: int) -> np.ndarray:
    """int: the sums of ever more of bool `lines` along an axis, from none to all."""
    return np.insert(lines.cumsum(axis=axis), 0, 0, axis=axis)
