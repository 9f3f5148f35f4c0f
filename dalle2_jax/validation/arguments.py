"""What a user hands to the library, checked: plain values, or one line that says what is wrong."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from dalle2_jax.errors import UserError, near_miss

MOST_HELD = 10_000
"""Pictures that are returned at once: more would fill the memory."""


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int within low..high; UserError for anything else."""
    told = f"{name} must be a whole number from {low}" + (f" to {high}" if high else "")
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # an array has an __index__ too
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise UserError(f"{told}, not {value!r}")
    return number


def prompts(value: Any) -> list[str]:
    """One text or several, none of them empty, as a list; UserError for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prompts must be a text or a list of texts, not {value!r}")
    if not texts or not all(text.strip() for text in texts):
        raise UserError("a prompt is empty: write what is to be drawn")
    return list(texts)


def prompt(value: Any) -> str:
    """One text that is not empty; UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(f"the prompt must be a text, not {value!r}")
    return prompts(value)[0]


def seeds(value: Any, count: int) -> np.ndarray:
    """One seed, or one for each of `count` prompts or pictures -> uint32 [count]; UserError for
    anything else."""
    one = not isinstance(value, list | tuple) and np.ndim(value) == 0
    each = [value] * count if one else list(value)
    if len(each) != count:
        raise UserError(f"{len(each)} seeds for {count} prompts: give one for each")
    return np.array([whole("seed", seed, 0, 2**32 - 1) for seed in each], np.uint32)


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float within low..high; UserError for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise UserError(f"{name} must be a number within {low} and {high}, not {value!r}")
    return float(value)


def only(known: Sequence[str], options: Mapping[str, Any]) -> None:
    """UserError for an option that is none of the `known`, naming the near miss."""
    for name in options:
        if name not in known:
            raise UserError(f"there is no option {name!r} here{near_miss(name, known)}")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """UserError unless the value is one of the `known`, naming the near miss."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} is {value!r}{near_miss(str(value), known)}")


def plain(value: Any) -> Any:
    """numpy's and JAX's numbers as Python's and several as a tuple: settings are hashable, and
    plain JSON."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(plain(item) for item in value) if isinstance(value, list) else value


def array_of(name: str, value: Any) -> np.ndarray:
    """UserError for rows of several lengths."""
    try:
        return np.asarray(value)
    except ValueError:  # numpy's word for them
        raise UserError(f"{name} must be an array, all of its rows of one length") from None


def numbers(name: str, value: Any) -> np.ndarray:
    """`value` as float32; UserError for what is not, or not finite."""
    array = array_of(name, value)
    if array.dtype.kind not in "USOc":  # texts, objects, complex numbers
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if np.isfinite(array).all():
            return array
    raise UserError(f"{name} must be an array of finite numbers")


def pictures(value: Any) -> np.ndarray:
    """`value` uint8 [b, h, w, 3], one picture at least; UserError for anything else."""
    array = array_of("pictures", value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(
            f"pictures must be uint8 [b, h, w, 3], not {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise UserError(f"pictures: there is none in uint8 {list(array.shape)}")
    return array


def picture(name: str, value: Any) -> np.ndarray:
    """`value` uint8 [h, w, 3] as a batch of one; UserError for anything else."""
    array = array_of(name, value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise UserError(f"{name} must be uint8 [h, w, 3], not {array.dtype} {list(array.shape)}")
    return array[None]


def mask(value: Any, shape: Sequence[int]) -> np.ndarray:
    """`value` bool [h, w] of a picture's `shape`, True at a pixel at least; UserError for anything
    else."""
    array = array_of("mask", value)
    if array.dtype != bool or array.ndim != 2:
        told = f"not {array.dtype} {list(array.shape)}"
        raise UserError(f"mask must be bool [h, w], True where it is to be drawn, {told}")
    if array.shape != tuple(shape[:2]):
        (h, w), (height, width) = array.shape, shape[:2]
        told = f"the mask is {w} x {h}, the picture {width} x {height}"
        raise UserError(f"{told}: give a mask of the picture's size")
    if not array.any():
        raise UserError("the mask leaves nothing to draw: white, or alpha 0, marks what is drawn")
    return array


def known(value: Any, size: int, counts: Sequence[int]) -> np.ndarray:
    """`value` uint8 [one of counts, size, size, 4]; UserError for anything else."""
    array = array_of("known", value)
    if array.dtype != np.uint8 or array.shape not in [(n, size, size, 4) for n in counts]:
        told = f"not {array.dtype} {list(array.shape)}"
        raise UserError(f"known must be uint8 {[counts[0], size, size, 4]}, {told}")
    return array


def rows(name: str, value: Any, dim: int, unit_length: bool, counts: Sequence[int]) -> np.ndarray:
    """`value` float32 [one of counts, dim], each row scaled to unit length where that is wanted;
    UserError if it cannot be."""
    try:
        rows = np.asarray(value)
        if rows.dtype.kind in "US":  # numpy would read "1.0" as a number
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
        rows = rows / largest  # or the squares might not fit
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)
