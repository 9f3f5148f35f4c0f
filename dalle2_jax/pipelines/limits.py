"""Limits of the numbers that a `Request` and the methods of `DALLE2` take, each in one place.

A request is checked when it is made, long before a model is loaded; a method of `DALLE2` when it is
called. Both look here, so that they refuse the same values with the same message.
"""

from __future__ import annotations

from typing import Any

from dalle2_jax.validation import arguments, checks

MAX_RETURNED = arguments.MAX_RETURNED
_MAX_UINT32 = 2**32 - 1  # seeds and the number of an image are folded into keys as uint32

# name: (lowest, highest), both allowed; None: no limit.
_WHOLE_NUMBERS: dict[str, tuple[int, int | None]] = {
    "n": (1, _MAX_UINT32 + 1),
    "seed": (0, _MAX_UINT32),
    "best_of": (1, None),
    "frames": (1, MAX_RETURNED),
    "iterations": (1, None),
    "size": (1, None),
    "batch_size": (1, None),
    "preview_every": (1, None),
    "feather": (0, None),
    "left": (0, None),
    "right": (0, None),
    "up": (0, None),
    "down": (0, None),
}
# At an overlap of 0 a frame of an outpainting would see nothing of the image, at 1 add nothing.
_NUMBERS = {
    "eta": (0, 1),
    "theta": (0, 1),
    "overlap": (0.01, 0.99),
}


def whole_number(
    name: str, value: Any, lowest: int | None = None, highest: int | None = None
) -> int:
    """Returns an argument as an int; raises UserError unless it is a whole number in its limits.

    Args:
        name: the argument's, one of the table above.
        value: what the user gave.
        lowest, highest: limits in place of the table's, where the caller's are narrower.
    """
    low, high = _WHOLE_NUMBERS[name]
    low = low if lowest is None else lowest
    high = high if highest is None else highest
    return checks.whole_number(name, value, low, high)


def number(name: str, value: Any) -> float:
    """Returns an argument as a float; raises UserError unless it is a number in its limits."""
    return checks.number(name, value, *_NUMBERS[name])
