"""Sections of a config, made into objects and checked.

A section (`model`, `diffusion`, `task.sampling`, ...) holds the arguments of one class, a dataclass
or a Flax module, and the class is the only list of them:

    config.model = {"width": 512, "mults": [1, 2, 3, 4]}
    construct(Decoder, config.model, "config.model")  ->  Decoder(width=512, mults=(1, 2, 3, 4))

So a class has no reader of its own, and an unknown key is an error that names the key it resembles.
Where an argument is a section itself, as a decoder's `unet` is, the attribute `SECTIONS` of its
class names the class whose arguments that section holds: {"unet": UNet}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.validation.checks import LARGEST, number, whole_number

T = TypeVar("T")


class Section(dict):
    """A dict that nobody changes: hashable, so that the Flax module it belongs to is hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def check_keys(keys: Iterable[str], known_keys: Iterable[str], where: str) -> None:
    """Raises UserError for the first of `keys` that is not in `known_keys`.

    `where` is what the message calls the section, such as `config.model`.
    """
    known_keys = list(known_keys)
    for key in keys:
        if key not in known_keys:
            raise UserError(f"{where}: unknown key {key!r}{near_miss(key, known_keys)}")


def check_numbers(where: str, low: float, high: float = LARGEST, /, **values: float) -> None:
    """Raises UserError for the first of a section's `values` that is no number in low..high.

    As in `check_numbers("config.task", 0, 1, drop_caption=0.1, noise=0.0)`; see `checks.number`.
    """
    for name, value in values.items():
        number(f"{where}.{name}", value, low, high)


def check_whole_numbers(where: str, low: int, high: int | None = None, /, **values: int) -> None:
    """Raises UserError for the first of a section's `values` that is no integer in low..high."""
    for name, value in values.items():
        whole_number(f"{where}.{name}", value, low, high)


def construct(cls: type[T], section: Mapping[str, Any], where: str, **arguments: Any) -> T:
    """Makes an instance of `cls` from a section of a config.

    Lists become tuples and inner sections become `Section`, so that the instance is hashable.

    Args:
        cls: a dataclass or a Flax module.
        section: arguments of `cls` by name, as a dict or a ConfigDict.
        where: what messages call the section, such as `config.model`.
        **arguments: further arguments, which the section may not hold.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong kind.
    """
    fields = _fields(cls)
    # Keys of inner sections are checked here, too: their class is constructed later, or by Flax.
    check_keys(section, [f.name for f in fields if f.name not in arguments], where)
    for name, inner in _inner_sections(cls).items():
        check_keys(section.get(name) or (), [f.name for f in _fields(inner)], f"{where}.{name}")
    arguments = {key: _frozen(value) for key, value in section.items()} | arguments
    for f in fields:
        is_required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if is_required and f.name not in arguments:
            raise UserError(f"{where}: the key {f.name!r} is missing")
    try:
        return cls(**arguments)
    except UserError:  # from the class's own checks, which name the setting
        raise
    except (TypeError, ValueError) as error:  # for example a text where a number belongs
        raise UserError(f"{where}: {error}") from error


def with_defaults(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `section` completed by the defaults of `cls`; a default dtype is given by its name.

    Inner sections are completed likewise, except for arguments that `cls` has under the same name:
    it passes its own on to them.
    """
    completed = _defaults(cls) | dict(section.items())
    outer_names = {f.name for f in _fields(cls)}
    for name, inner in _inner_sections(cls).items():
        if hasattr(completed.get(name), "items"):
            defaults = {k: v for k, v in _defaults(inner).items() if k not in outer_names}
            completed[name] = defaults | dict(completed[name].items())
    return completed


def to_json_values(section: Any) -> Any:
    """Returns a section as dicts, lists and scalars, which `json` can write."""
    if hasattr(section, "items"):
        return {key: to_json_values(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [to_json_values(value) for value in section]
    return section


def _inner_sections(cls: type) -> Mapping[str, type]:
    """Returns {argument: class} of the arguments of `cls` that are sections themselves."""
    return getattr(cls, "SECTIONS", {})


def _defaults(cls: type) -> dict[str, Any]:
    """Returns the arguments of `cls` that have a default, with it."""
    values = {f.name: f.default for f in _fields(cls) if f.default is not dataclasses.MISSING}
    return {name: v.dtype.name if hasattr(v, "dtype") else v for name, v in values.items()}


def _fields(cls: Any) -> list[dataclasses.Field]:
    """Returns the arguments of `cls`; Flax's own, `parent` and `name`, are no settings."""
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]


def _frozen(value: Any) -> Any:
    """Returns a value of a config in hashable form."""
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
        return Section({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value
