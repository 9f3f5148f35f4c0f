"""What other programs' models consist of; their tensors and settings, read one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained.names import Rule

Tensors = dict[str, Callable[[], np.ndarray]]
"""{name: what reads the tensor}; nothing is read before."""


class Stage(NamedTuple):
    """One of our stages in a source: its entry in config.json, the folders or files of its tensors,
    each by a name of its own, and the rules for these, called NAME/TENSOR."""

    name: str
    entry: Mapping[str, Any]
    parts: Mapping[str, Path]
    rules: Sequence[Rule]


WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a file. UserError: it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the whole model again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings: copy it again")
    return found


def network(path: Path) -> Tensors:
    """The tensors of one network: of a file, or of a folder's files, of which safetensors go before
    pickles. UserError: there is none, or a file is missing or damaged."""
    return component(path) if path.is_dir() else tensors(path)


def component(folder: Path) -> Tensors:
    """`network` of a folder."""
    for suffix in ("safetensors", "bin"):
        for name in WEIGHTS:
            whole, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}.index.json"
            if whole.is_file():
                return tensors(whole)
            if index.is_file():
                files = sorted(set(read_json(index).get("weight_map", {}).values()))
                return {k: v for file in files for k, v in tensors(folder / file).items()}
    wanted = " or ".join(f"{name}.safetensors" for name in WEIGHTS[:2])
    raise UserError(f"{folder} holds no weights: {wanted} is missing")


def tensors(path: Path) -> Tensors:
    """The tensors of a file of safetensors, or of torch's, of which no code is run; those of a list
    are called by their places."""
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole model again")
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: Path) -> Tensors:
    try:
        file = safe_open(path, framework="np")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                return file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: {name} cannot be read ({error}): copy it again"
                ) from error

        return read

    return {name: reader(name) for name in names}


def _pickled(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a pickle, which torch reads: pip install 'dalle2-jax[convert]', or give "
            "safetensors"
        ) from None
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; before, it cannot be mapped
        found = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # pickles fail in as many ways as there are
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            told = (
                f"holds more than weights ({refused[1]}), which is not loaded: save its state_dict"
            )
            raise UserError(f"{path} {told} alone, where you trust it") from error
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        told = told.partition(". ")[0]
        raise UserError(f"{path} is damaged or cut short ({told}): copy it again") from error
    while isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if isinstance(found, list | tuple):
        found = {str(place): tensor for place, tensor in enumerate(found)}
    if not isinstance(found, Mapping) or not all(torch.is_tensor(x) for x in found.values()):
        raise UserError(f"{path} holds no tensors by name")

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if tensor.dtype == torch.bfloat16:  # which numpy does not know
                return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        return read

    return {name: reader(tensor) for name, tensor in found.items()}


def expect(where: str, settings: Mapping[str, Any], **wanted: Any) -> None:
    """UserError unless `settings` say what is `wanted`, one value or several; none will do, too."""
    for key, value in wanted.items():
        values = value if isinstance(value, tuple) else (value,)
        if key in settings and settings[key] not in values:
            known = " or ".join(repr(v) for v in values)
            raise UserError(f"{where}: {key} is {settings[key]!r}, but this reads {known} alone")


def need(where: str, settings: Mapping[str, Any], *keys: str) -> Sequence[Any]:
    """The values of `keys`. UserError: one is missing."""
    for key in keys:
        if settings.get(key) is None:
            raise UserError(f"{where}: {key} is missing")
    return [settings[key] for key in keys]
