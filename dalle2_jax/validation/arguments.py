"""Checks of what users pass to `DALLE2`: prompts, seeds, images, masks and embeddings.

Each check returns the argument in the one form in which the rest of the program holds it, or raises
a UserError that names the argument, the form it must have and the form it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle2_jax.errors import UserError
from dalle2_jax.validation.checks import whole_number

MAX_RETURNED = 10_000
"""The most images that one call returns: a mistyped number must not fill the memory."""


def prompts(value: Any) -> list[str]:
    """Returns one text or several as a list; raises UserError for anything else or an empty one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prompts must be a text or a list of texts, not {value!r}")
    if not texts or not all(text.strip() for text in texts):
        raise UserError("a prompt is empty: write what the image is to show")
    return list(texts)


def prompt(value: Any) -> str:
    """Returns one text that is not empty; raises UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(f"the prompt must be a text, not {value!r}")
    return prompts(value)[0]


def seeds(value: Any, count: int) -> np.ndarray:
    """Returns seeds uint32 [count], from one seed or one for each prompt or image.

    Raises UserError for anything else.
    """
    # Not np.ndim of a list: NumPy refuses ragged ones, which `whole_number` reports.
    is_scalar = not isinstance(value, list | tuple) and np.ndim(value) == 0
    values = [value] * count if is_scalar else list(value)
    if len(values) != count:
        raise UserError(f"{len(values)} seeds for {count} prompts: give one for each")
    return np.array([whole_number("seed", seed, 0, 2**32 - 1) for seed in values], np.uint32)


def _array(name: str, value: Any) -> np.ndarray:
    """Returns `value` as an array; raises UserError if its rows have different lengths."""
    try:
        return np.asarray(value)
    except ValueError:
        raise UserError(f"{name} must be an array, all of its rows of one length") from None


def finite_array(name: str, value: Any) -> np.ndarray:
    """Returns `value` as float32; raises UserError unless all of its numbers are finite in it."""
    array = _array(name, value)
    if array.dtype.kind not in "USOc":  # texts, objects, complex numbers
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if np.isfinite(array).all():
            return array
    raise UserError(f"{name} must be an array of finite numbers")


def images(value: Any) -> np.ndarray:
    """Returns uint8 [b, h, w, 3], b >= 1; raises UserError for anything else."""
    array = _array("images", value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"images must be uint8 [b, h, w, 3], not {array.dtype} {list(array.shape)}")
    if not array.size:
        raise UserError(f"images is empty, uint8 {list(array.shape)}: give one image or more")
    return array


def image(name: str, value: Any) -> np.ndarray:
    """Returns uint8 [h, w, 3] as a batch of one; raises UserError for anything else."""
    array = _array(name, value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise UserError(f"{name} must be uint8 [h, w, 3], not {array.dtype} {list(array.shape)}")
    return array[None]


def edit_mask(value: Any, shape: Sequence[int]) -> np.ndarray:
    """Returns the mask, bool [h, w] of an image's `shape`, True where pixels are regenerated.

    Raises UserError for anything else, and for a mask that is True nowhere.
    """
    array = _array("edit_mask", value)
    if array.dtype != bool or array.ndim != 2:
        raise UserError(
            "edit_mask must be bool [h, w], True where the image is to be regenerated, "
            f"not {array.dtype} {list(array.shape)}"
        )
    if array.shape != tuple(shape[:2]):
        (mask_height, mask_width), (height, width) = array.shape, shape[:2]
        raise UserError(
            f"the mask is {mask_width} x {mask_height}, the image {width} x {height}: "
            "give a mask of the image's size"
        )
    if not array.any():
        raise UserError(
            "the mask leaves nothing to regenerate: white, or alpha 0, marks what is regenerated"
        )
    return array


def known_images(name: str, value: Any, size: int, counts: Sequence[int]) -> np.ndarray:
    """Returns partly known images, uint8 RGBA [one of counts, size, size, 4].

    Pixels are known where alpha is 255. Raises UserError for anything else.
    """
    array = _array(name, value)
    if array.dtype != np.uint8 or array.shape not in [(n, size, size, 4) for n in counts]:
        raise UserError(
            f"{name} must be uint8 {[counts[0], size, size, 4]}, "
            f"not {array.dtype} {list(array.shape)}"
        )
    return array


def embeddings(
    name: str, value: Any, dim: int, unit_length: bool, counts: Sequence[int]
) -> np.ndarray:
    """Returns `value` as float32 [one of counts, dim].

    Args:
        name: the argument's name in messages.
        value: rows of numbers, in any form that NumPy makes an array of.
        dim: the length of CLIP's embeddings.
        unit_length: whether to scale the rows to length 1, as this CLIP's embeddings are.
        counts: the numbers of rows that are accepted; messages name the first.

    Raises:
        UserError: another shape, no numbers, or a row that is all 0 or not finite.
    """
    try:
        rows = np.asarray(value)
        if rows.dtype.kind in "US":  # NumPy would read "1.0" as a number
            raise TypeError
        rows = rows.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be numbers {[counts[0], dim]}") from None
    if rows.shape not in [(count, dim) for count in counts]:
        raise UserError(f"{name} must be {[counts[0], dim]}, not {list(rows.shape)}")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if bad.size:
        raise UserError(f"{name}[{bad[0]}] must be finite and not all 0")
    if unit_length:
        rows = rows / largest  # first, because the squares of large numbers would overflow
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)
