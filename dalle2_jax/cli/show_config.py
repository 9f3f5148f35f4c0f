"""`train.py --show_config`: every setting of a config with the origin of its value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from dalle2_jax import build, stages
from dalle2_jax.data.config import DataConfig
from dalle2_jax.storage import config_file


def lines(config: build.Config, path: str, arguments: Sequence[str]) -> Iterator[str]:
    """Yields `key = value  # origin` for each setting, in the config's order.

    Args:
        config: the complete config, overrides applied.
        path: FILE:VARIANT that it was read from.
        arguments: the command line.
    """
    in_file = _flat(config_file.load(path))
    overridden = {
        match[1]
        for argument in arguments
        if (match := re.match(r"--?(?:no)?config\.([^=]+)", argument))
    }
    of_trainer = set(_flat(build.defaults()))
    settings = {f"config.{key}": (value, key) for key, value in _flat(config).items()}
    width = max(len(f"{name} = {value!r}") for name, (value, _) in settings.items())
    for name, (value, key) in settings.items():
        if key in overridden:
            origin = "command line"
        elif key in in_file or (key == "task.name" and "task" in in_file):
            origin = path
        elif key in of_trainer:
            origin = "default of build.defaults"
        else:
            origin = f"default of {_class_of(config, key).__name__}"
        text = f"{name} = {value!r}"
        yield f"{text:{min(width, 60)}}  # {origin}"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value}, sections that are empty or rules included as values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _class_of(config: build.Config, key: str) -> type:
    """Returns the class whose arguments the section of `key` holds."""
    section, *inner = key.split(".")
    task = stages.resolve(stages.find_family(config.task.name, "config.task.name").task)
    cls = {"data": DataConfig, **task.SECTIONS}[section]
    for name in inner[:-1]:
        cls = cls.SECTIONS[name]
    return cls
