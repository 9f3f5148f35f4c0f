"""Checks of single values, with one form of message.

Arguments of the API, settings of a config and entries of a model folder come from outside the
program, and the same checks read them all. A check takes the name by which the user knows the value
(`n`, `config.task.low_size`), the value, and bounds. It returns the value as a plain Python one, or
raises a UserError of the form

    NAME must be REQUIREMENT, not VALUE

A check of another kind is a condition and its requirement in words: see `require`.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection
from numbers import Real
from typing import Any

from dalle2_jax.errors import UserError, closest

LARGEST = sys.float_info.max
"""The largest finite number: as a bound, it excludes infinity and nothing else."""


def require(is_valid: bool, name: str, requirement: str, value: Any) -> None:
    """Raises UserError, `name` must be `requirement`, not `value`, unless `is_valid`."""
    if not is_valid:
        raise UserError(f"{name} must be {requirement}, not {value!r}")


def is_whole_number(value: Any, low: int | None = None, high: int | None = None) -> bool:
    """Returns whether `value` is an integer of Python or NumPy in low..high; a bool is none."""
    if isinstance(value, bool):
        return False
    try:
        integer = operator.index(value)
    except TypeError:  # arrays have an __index__, too, which raises this
        return False
    return (low is None or low <= integer) and (high is None or integer <= high)


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    """Returns whether `value` is a number in low..high; a bool is none, NaN is in no range."""
    # Compared as they are: float() would fail for an integer that is larger than any float.
    return _is_real(value) and bool(low <= value <= high)


def _is_real(value: Any) -> bool:
    # Python's numbers and NumPy's scalars are Real, arrays and texts are not.
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns `value` as an int; raises UserError unless it is a whole number in low..high."""
    limits = f"from {low}" if high is None else f"from {low} to {high}"
    require(is_whole_number(value, low, high), name, f"a whole number {limits}", value)
    return operator.index(value)


def number(name: str, value: Any, low: float = -LARGEST, high: float = LARGEST) -> float:
    """Returns `value` as a float; raises UserError unless it is a number in low..high.

    Infinity is accepted where `math.inf` is a bound.
    """
    # "finite" only where a value may fail by being infinite alone, not with bounds on both sides.
    requirement = "a finite number" if LARGEST in (-low, high) else "a number"
    if low > -LARGEST:
        requirement += f" from {low}"
    if high < LARGEST:
        requirement += f" to {high}"
    require(is_number(value, low, high), name, requirement, value)
    return float(value)


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """Returns `value`; raises UserError, with the choice nearest to it, unless it is a choice."""
    if isinstance(value, str) and value in choices:
        return value
    requirement = f"one of {', '.join(map(repr, choices))}"
    near = closest(str(value), choices)
    hint = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"{name} must be {requirement}, not {value!r}{hint}")


def to_python_values(value: Any) -> Any:
    """Returns scalars of NumPy and JAX as Python's, and their arrays as (nested) tuples.

    The result is hashable, so that it can be a setting of a jitted function.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # scalars have it, too
    return tuple(to_python_values(item) for item in value) if isinstance(value, list) else value
