"""Reading a config file: FILE or FILE:VARIANT -> the ConfigDict of its `get_config`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dalle2_jax.errors import UserError


def load(path: str) -> Any:
    """Runs the file and returns `get_config(VARIANT)`, or `get_config()` without a variant.

    Raises UserError if there is no such file, it fails, or it returns no ConfigDict.
    """
    file, _, variant = os.path.expanduser(path).partition(":")
    if not Path(file).is_file():
        raise UserError(_missing(file))
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file: name one such as configs/decoder.py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(Path(file).resolve().parent.parent):  # what configs share: configs.shared
            spec.loader.exec_module(module)
            config = module.get_config(*filter(None, [variant]))
    except Exception as error:  # a config file may raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"{path}: {kind}{error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returns no ConfigDict")
    return config


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts `folder` on Python's path."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _missing(file: str) -> str:
    if file.startswith("configs/") and not Path("configs").is_dir():
        return (
            f"there is no file {file}: configs/ comes with a clone of the project, not with the "
            "installed package; run this command in a clone"
        )
    return f"there is no file {file}"
