"""The tensors of a TorchScript archive, in which OpenAI published CLIP.

`torch.load` reads no such archive with `weights_only`, and `torch.jit.load` compiles the program
in it. Here nothing of it is run, nor is torch needed: its pickle is read with classes of our own,
and whatever else it names is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle2_jax.errors import UserError

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


def is_archive(path: Path) -> bool:
    """Returns whether the file is a TorchScript archive; a damaged one is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # damaged archives fail in as many ways as there are
        return False


def tensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Returns {name: a function that reads the tensor}, named as in the module's state.

    Raises UserError if the archive is damaged, or holds what is neither a module nor a tensor.
    """
    try:
        archive = zipfile.ZipFile(path)
        # A zip of ROOT/data.pkl, the module with its tensors as references, and ROOT/data/KEY, the
        # bytes of each storage. The program itself, ROOT/code, is not looked at.
        root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).split("/")[0]
        with archive.open(f"{root}/data.pkl") as file:
            module = _Unpickler(file, archive, root).load()
        return dict(_named(module, ""))
    except UserError:
        raise
    except Exception as error:  # damaged pickles fail in as many ways as there are
        lines = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{path} is damaged or cut short ({lines[0]}): copy it again") from error


class _Module:
    """Stands for every module of the program: its state becomes attributes."""


class _Tensor:
    """A tensor of the archive, read when it is called: a window into the bytes of a storage."""

    def __init__(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def __call__(self) -> np.ndarray:
        archive, name, dtype = self.storage
        try:
            flat = np.frombuffer(archive.read(name), dtype)[self.offset :]
        except Exception as error:
            message = f"{archive.filename} is damaged or cut short ({error}): copy it again"
            raise UserError(message) from error
        # The shape and strides come from the file, so the last element is checked to lie inside;
        # `as_strided` itself checks nothing.
        strides = [step * flat.itemsize for step in self.stride]
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if min(self.shape, default=1) < 1 or min(strides, default=0) < 0 or last >= len(flat):
            raise UserError(f"{archive.filename}: a tensor lies outside of its data: copy it again")
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Builds modules and tensors, and refuses to look up anything else, so that no code runs."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists of one type
            return lambda value, *_: value
        message = f"holds more than weights ({module}.{name}), which is not loaded"
        raise UserError(f"{self.archive.filename} {message}")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return self.archive, f"{self.root}/data/{key}", dtype


def _named(value: Any, prefix: str) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    if isinstance(value, _Tensor):
        yield prefix, value
    elif isinstance(value, _Module):
        for name, inner in vars(value).items():
            yield from _named(inner, f"{prefix}.{name}" if prefix else name)
