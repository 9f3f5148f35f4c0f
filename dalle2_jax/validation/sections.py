"""Sections of a config -> objects, with an error that names the near miss of an unknown key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dalle2_jax.errors import UserError, near_miss

T = TypeVar("T")


class Section(dict):
    """A dict that nobody changes, hashable so that the network it sizes is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises UserError for the first of `given` that is not in `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(key, known)}")


def check_range(where: str, least: float, most: float = math.inf, **values: float) -> None:
    """Raises UserError for the first of `values` outside [least, most]; NaN is in no range."""
    for name, value in values.items():
        if not least <= value <= most:
            bound = f"{least} or more" if most == math.inf else f"within {least} and {most}"
            raise UserError(f"{where}.{name}={value} must be {bound}")


def with_defaults(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """`section` over the defaults of the dataclass `cls`, a dtype by its name.

    So too the sections within (`cls.SECTIONS`), but for what their owner hands on itself.
    """
    filled = _defaults(cls) | dict(section.items())
    own = {f.name for f in _fields(cls)}
    for name, inner in getattr(cls, "SECTIONS", {}).items():
        if hasattr(filled.get(name), "items"):
            defaults = {k: v for k, v in _defaults(inner).items() if k not in own}
            filled[name] = defaults | dict(filled[name].items())
    return filled


def _defaults(cls: type) -> dict[str, Any]:
    found = {f.name: f.default for f in _fields(cls) if f.default is not dataclasses.MISSING}
    return {name: v.dtype.name if hasattr(v, "dtype") else v for name, v in found.items()}


def construct(cls: type[T], section: Mapping[str, Any], where: str, **given: Any) -> T:
    """An instance of the dataclass or Flax module `cls` from a section of a config.

    Lists become tuples and sections `Section`, so that the result is hashable; `given` are
    arguments from elsewhere. `cls.SECTIONS` names the class whose arguments a section within holds.
    Raises UserError for an unknown or a missing key and a value of the wrong kind, and says where.
    """
    fields = _fields(cls)
    check_keys(section, [f.name for f in fields if f.name not in given], where)
    for name, inner in getattr(cls, "SECTIONS", {}).items():
        check_keys(section.get(name) or (), [f.name for f in _fields(inner)], f"{where}.{name}")
    arguments = {key: _frozen(value) for key, value in section.items()} | given
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in arguments:
            raise UserError(f"{where}: the key {f.name!r} is missing")
    try:
        return cls(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # a text where a number belongs
        raise UserError(f"{where}: {error}") from error


def _fields(cls: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]


def _frozen(value: Any) -> Any:
    if hasattr(value, "items"):  # ConfigDict is no Mapping
        return Section({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def plain(section: Any) -> Any:
    """A config's section as dicts, lists and scalars, ready for JSON."""
    if hasattr(section, "items"):
        return {key: plain(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [plain(value) for value in section]
    return section
