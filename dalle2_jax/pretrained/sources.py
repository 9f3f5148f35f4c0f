"""Models of other programs: their tensors and settings, read one at a time."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import torchscript
from dalle2_jax.pretrained.names import Rule
from dalle2_jax.storage import paths
from dalle2_jax.validation.checks import is_number, is_whole_number

Tensors = dict[str, Callable[[], np.ndarray]]
"""{name: what reads the tensor}; nothing is read before."""


class Stage(NamedTuple):
    """One of our stages in a source: its entry in config.json, the folders or files of its tensors,
    each by a name of its own, and the rules for these, called NAME/TENSOR."""

    name: str
    entry: Mapping[str, Any]
    parts: Mapping[str, Path]
    rules: Sequence[Rule]


SUFFIXES = ("safetensors", "bin")  # the first goes before the second, which is a pickle
WEIGHTS = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the settings in a file. Raises UserError if it is missing or damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the whole model again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {paths.reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: copy it again")
    return settings


def network(path: Path) -> Tensors:
    """Returns the tensors of one network: of a file, or of the files of a folder.

    Raises UserError if there is none, or a file is missing or damaged.
    """
    if not path.is_dir():
        return tensors(path)
    # All names as safetensors are tried before any pickle, which only torch can read.
    for suffix in SUFFIXES:
        for name in WEIGHTS:
            whole, index = path / f"{name}.{suffix}", path / f"{name}.{suffix}.index.json"
            if whole.is_file():
                return tensors(whole)
            if index.is_file():
                files = read_json(index).get("weight_map")
                if not isinstance(files, Mapping) or not all(map(_is_name, files.values())):
                    raise UserError(f"{index} names no files of this folder: copy it again")
                # Large networks are cut into several files; an index says which holds a tensor.
                parts = [tensors(path / file) for file in sorted(set(files.values()))]
                return {name: read for part in parts for name, read in part.items()}
    wanted = " or ".join(f"{name}.safetensors" for name in WEIGHTS[:2])
    for variant in sorted(path.glob("*.fp16.*")):
        wanted += f" (there is {variant.name}: give it that name)"
        break
    raise UserError(f"{path} holds no weights: {wanted} is missing")


def tensors(path: Path) -> Tensors:
    """Returns the tensors of a file of safetensors, or of torch's, of which no code is run.

    Those of a list are named by their places.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole model again")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return torchscript.tensors(path) if torchscript.is_archive(path) else _pickled(path)


def _safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # Opened anew for each tensor: pages of a mapped file count as the process's memory for
            # as long as it is open, and a model may be larger than the memory.
            try:
                with safe_open(path, framework="np") as file:
                    return file.get_tensor(name)
            except Exception as error:  # types that numpy does not know, too
                raise UserError(
                    f"{path}: {name} cannot be read ({error}): copy it again"
                ) from error

        return read

    return {name: reader(name) for name in names}


def _pickled(path: Path) -> Tensors:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path} is a pickle, which torch reads: give safetensors or, in the project's folder, "
            "pip install -e '.[convert]'"
        ) from None
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; before, it cannot be mapped
        # `weights_only` refuses every class but tensors and containers: no code of the file runs.
        content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # pickles fail in as many ways as there are
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            message = (
                f"holds more than weights ({refused[1]}), which is not loaded: save its state_dict"
            )
            raise UserError(f"{path} {message} alone, where you trust it") from error
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = message.partition(". ")[0]
        raise UserError(f"{path} is damaged or cut short ({message}): copy it again") from error
    # Trainers (Lightning among them) save the weights as one entry of what they save.
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, list | tuple):
        content = {str(place): tensor for place, tensor in enumerate(content)}
    if not isinstance(content, Mapping) or not all(torch.is_tensor(x) for x in content.values()):
        raise UserError(f"{path} holds no tensors by name")

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                # numpy does not know bfloat16, so its bits pass as integers.
                if tensor.dtype == torch.bfloat16:
                    return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
                return tensor.detach().numpy()
            except Exception as error:  # sparse, quantised, of a type that numpy does not know
                raise UserError(f"{path}: a tensor cannot be read ({error})") from error

        return read

    return {name: reader(tensor) for name, tensor in content.items()}


@contextlib.contextmanager
def sizes_of(path: Path) -> Iterator[None]:
    """Reports sizes that cannot be read within the block as another network in `path`."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} is another network: {error} is missing") from error
    except (ValueError, IndexError, ArithmeticError) as error:
        raise UserError(f"{path} is another network ({error})") from error


class Config:
    """Settings of another program's network, each checked as it is asked for.

    `default` is the value of a setting that is missing; None: it must be there.
    """

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None):
        """Reads the file, or takes `values`, a part of it. Raises UserError if it is damaged."""
        self.path = path
        self.values = read_json(path) if values is None else values

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")

    def expect(self, **wanted: Any) -> None:
        """Raises UserError unless each setting is one of its `wanted` values, or missing.

        Our networks have no such option: with another value they would compute something else from
        the same weights, without an error.
        """
        for key, value in wanted.items():
            values = value if isinstance(value, tuple) else (value,)
            if key in self.values and self.values[key] not in values:
                known = " or ".join(repr(v) for v in values)
                raise self.error(f"{key} is {self.values[key]!r}, but this reads {known} alone")

    def _get(self, key: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        # null is the same as missing: programs write all their settings, also the unset ones.
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{key} is missing")
        if not fits(value):
            raise self.error(f"{key} is {value!r}, not {what}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        return self._get(key, default, _is_whole, "a whole number from 1")

    def number(self, key: str, default: float | None = None) -> float:
        return self._get(key, default, _is_number, "a number")

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, lambda value: isinstance(value, str), "a text")

    def wholes(self, key: str) -> list[int]:
        return self._get(key, None, _all(_is_whole), "a list of whole numbers from 1")

    def numbers(self, key: str, default: Sequence[float] | None = None) -> list[float]:
        return list(self._get(key, default, _all(_is_number), "a list of numbers"))

    def texts(self, key: str) -> list[str]:
        return self._get(key, None, _all(lambda v: isinstance(v, str)), "a list of texts")


def _is_name(value: Any) -> bool:
    # A name with a folder in it could point anywhere on this machine.
    return isinstance(value, str) and Path(value).name == value


def _is_whole(value: Any) -> bool:
    return is_whole_number(value, 1, 2**31 - 1)


def _is_number(value: Any) -> bool:
    return is_number(value, -1e30, 1e30)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(fits, value))
