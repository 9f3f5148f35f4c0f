"""Tables over t as arguments of a compiled program.

A schedule and the solver over it hold all their numbers as tables [T], one entry a step. Compiled
into a program as constants, they would make another number of steps, or another eta, another
program. So a program takes them as an argument:

    numbers = padded(tables_of(solver), length)      outside, float64 -> float32, all of one length
    solver  = with_tables(template, numbers)         inside, where `numbers` are tracers

`template` is a solver of the same class over any schedule. Its step reads only its tables, so with
the tables of another solver it takes that one's steps. Entries beyond T are never read.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

Owner = TypeVar("Owner")


class table(functools.cached_property):
    """Marks a cached property as a table [T], or a tuple of tables, that a step reads."""


def tables_of(owner: Any) -> dict[str, Any]:
    """Returns the tables of a dataclass by name, those of the dataclasses it holds within."""
    # From the classes, not the instance: a cached property is in the instance only once computed.
    names = {
        name for cls in type(owner).__mro__ for name, x in vars(cls).items() if isinstance(x, table)
    }
    tables = {name: getattr(owner, name) for name in sorted(names)}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        # Arrays among the fields (alpha_bar, timesteps, DDIM's variance) are tables as well.
        if isinstance(value, np.ndarray):
            tables[field.name] = value
        elif dataclasses.is_dataclass(value):
            tables[field.name] = tables_of(value)
    return tables


def padded(tables: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns the tables at one length, float32 (integers: int32), their last entry repeated."""

    def pad(values: np.ndarray) -> np.ndarray:
        dtype = np.int32 if values.dtype.kind in "iu" else np.float32
        # One length for all numbers of steps, so that they share a compiled program.
        return np.pad(values, (0, length - len(values)), mode="edge").astype(dtype)

    return jax.tree.map(pad, dict(tables))


def with_tables(template: Owner, tables: Mapping[str, Any]) -> Owner:
    """Returns a copy of `template` that reads these tables, as `tables_of` names them."""
    # The copy may keep cached values of the template that are no tables. A step reads none of them.
    owner = copy.copy(template)
    for name, value in tables.items():
        inner = getattr(template, name) if isinstance(value, Mapping) else None
        # Frozen dataclasses and cached properties both keep their values here.
        owner.__dict__[name] = value if inner is None else with_tables(inner, value)
    return owner
