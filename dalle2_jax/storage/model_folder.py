"""A model folder: `config.json` and one `<stage>.safetensors` a stage.

Training exports it, sampling loads it, and nothing in it can run code. Tensors are named by their
path in the nested parameters with dots between ("blocks.attn.kernel"), on disk in float32, float16
or bfloat16, in memory always in float32.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dalle2_jax.errors import UserError
from dalle2_jax.storage import licence, paths
from dalle2_jax.storage.atomic import remove_stale, replacing
from dalle2_jax.version import __version__

FORMAT = 1
CONFIG_NAME = "config.json"
PACKAGED = Path(__file__).parent.parent / "weights"
StorageDtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SETTINGS = ("*.json", "*.txt", "*.md", "LICENSE*")  # all but tensors, of any program's model
_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve(name: str | os.PathLike[str]) -> Path:
    """A model's name -> its folder: "tiny" (in the package), a folder, or a hub id "owner/name".

    A packaged name goes before a folder of that name, which is written "./tiny". A folder in a
    bucket is copied to this machine, but for what is here already from the last time.

    Raises UserError, in one line, for a name that is none of them or a hub out of reach.
    """
    if found := here(name):
        return found
    text = os.fspath(name)
    read_config(download(text, SETTINGS), text)  # before its weights: it may be of another program
    return download(text)


def here(name: str | os.PathLike[str]) -> Path | None:
    """Resolves a name as `resolve` does, but returns None for a hub id that is not on this
    machine.
    """
    text = os.fspath(name)
    if text in packaged_names():
        return PACKAGED / text
    if paths.is_remote(text):
        return paths.local_copy(paths.to_path(text), (CONFIG_NAME, licence.NAME, "*.safetensors"))
    try:
        path = Path(name).expanduser()
        if text and path.is_dir():
            return path
        if path.is_file():
            raise UserError(f"{name} is a file: give the model folder that holds {CONFIG_NAME}")
    except (OSError, RuntimeError) as error:  # a name too long, a home that is not there
        raise UserError(f"cannot look for model {text!r}: {error}") from error
    if not _HUB_ID.fullmatch(text):
        known = ", ".join(repr(p) for p in packaged_names()) or "none in this package"
        raise UserError(
            f"no model {text!r}: give a folder that holds {CONFIG_NAME}, a packaged model "
            f"({known}) or a hub id 'owner/name'"
        )
    return None


def packaged_names() -> list[str]:
    """The models inside the package, by name."""
    return sorted(p.parent.name for p in PACKAGED.glob(f"*/{CONFIG_NAME}"))


def download(
    hub_id: str, patterns: Sequence[str] = (CONFIG_NAME, "*.safetensors", "*.md", licence.NAME)
) -> Path:
    """The folder on this machine of the hub's model, with the files that fit one of `patterns`.

    Raises UserError, in one line, for a model that is not there and a hub out of reach.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"no folder {hub_id!r} here; to look for it on the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client lets through errors of many libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no folder {hub_id!r} here, and the hub does not give it ({reason})"
        ) from error


def read_config(folder: str | os.PathLike[str], name: str = "") -> dict[str, Any]:
    """The folder's `config.json`: {"format": 1, "version": ..., "stages": {stage: entry}}.

    Errors call the folder by `name`, where there is one.
    """
    path = paths.to_path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UserError(f"model folder {folder} does not exist") from None
        if (path.parent / "model_index.json").exists():
            told = f"{name or folder} is a model of diffusers: {_import(name or folder)}"
            raise UserError(told) from None
        raise UserError(f"model folder {name or folder} has no {CONFIG_NAME}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {paths.reason(error)}") from error
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, or nested without end
        raise UserError(f"{path} is not valid JSON ({error}): export the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("stages"), dict):
        if isinstance(config, dict) and config.get("model_type") == "clip":
            told = f"{name or folder} is a model of transformers"
            raise UserError(f"{told}: {_import(name or folder)}")
        if isinstance(config, dict) and "_class_name" in config:
            told = f"{folder} is one network of a model of diffusers"
            raise UserError(f"{told}: give the folder above it, which holds model_index.json")
        raise UserError(f"{path} is not a model folder's config: it has no 'stages'")
    if not all(isinstance(entry, dict) for entry in config["stages"].values()):
        raise UserError(f"{path} is not a model folder's config: a stage is not an object")
    number = config.get("format")
    if not isinstance(number, int) or number < 1:
        raise UserError(f"{path}: 'format' is {number!r}, not a whole number from 1")
    if number > FORMAT:
        raise UserError(
            f"{path} has format {number}, written by dalle2-jax {config.get('version', '?')}; "
            f"this is {__version__}, which reads up to {FORMAT}: upgrade dalle2-jax"
        )
    return config


def _import(folder: object) -> str:
    return f"first, python -m dalle2_jax.pretrained import {folder} --out FOLDER, and give that"


def read_stage(folder: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """A stage's entry in the folder's `config.json`; UserError if there is no such stage."""
    stages = read_config(folder)["stages"]
    if stage not in stages:
        there = ", ".join(sorted(stages)) or "none"
        raise UserError(f"model folder {folder} has no stage {stage!r}; there is: {there}")
    return stages[stage]


def read_params(folder: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """A stage's tensors as a nested dict of numpy arrays, floating ones in float32.

    Raises UserError for a folder or stage that is not there and a file that is cut short.
    """
    read_stage(folder, stage)
    path = stage_path(folder, stage)
    try:
        tensors = load_file(path)
    except FileNotFoundError:  # so too for a file that may not be read
        what = "may not be read" if os.path.exists(path) else "is missing"
        raise UserError(f"{path} {what}, though {CONFIG_NAME} names the stage") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}): copy or export it again"
        ) from error
    flat = {name: _to_memory(tensor) for name, tensor in tensors.items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def check_params(params: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """UserError unless `params` are, by name and shape, the arrays `expected` (nested alike)."""
    given, wanted = (
        {name: tuple(leaf.shape) for name, leaf in _flatten(tree).items()}
        for tree in (params, expected)
    )
    told = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
    told += [f"{name} is unknown" for name in sorted(given.keys() - wanted.keys())]
    told += [
        f"{name} is {given[name]}, not {shape}"
        for name, shape in wanted.items()
        if given.get(name, shape) != shape
    ]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise UserError(f"{where} holds another network: {', '.join(told[:3])}{more}")


def write_stage(
    folder: str | os.PathLike[str],
    stage: str,
    entry: Mapping[str, Any],
    params: Mapping[str, Any],
    dtype: StorageDtype = "float32",
) -> None:
    """Writes a stage into a model folder, made where it is not, other stages left as they are.

    Each file appears whole or not at all. `entry` (plain JSON values) goes to
    config["stages"][stage]; `params` is a nested mapping of arrays, floating ones stored as
    `dtype`. Raises UserError for a folder that cannot be written, for values that are not finite,
    or not so in `dtype`, and for another CLIP than the one that stages there were trained with.
    """
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"stage name {stage!r}: use lower-case letters, digits and _")
    if dtype not in _DTYPES:
        raise UserError(f"storage dtype {dtype!r}: know {', '.join(_DTYPES)}")
    folder = paths.to_path(folder)
    _config_with(folder, stage, entry)  # what is wrong with it is told before anything is written
    tensors = {
        name: _to_storage(name, tensor, _DTYPES[dtype]) for name, tensor in _flatten(params).items()
    }
    try:
        paths.make_folder(folder)
        remove_stale(folder)
        # The tensors first: a stage that config.json names is always there.
        told = paths.as_user_error("cannot write model folder", folder)
        with told, replacing(stage_path(folder, stage)) as temporary:
            # One entry of metadata: the order of several would differ from run to run.
            save_file(tensors, temporary, metadata={"stage": stage})
            _check_standing(folder, stage, _hash(temporary))
        told = paths.as_user_error("cannot write model folder", folder)
        with told, replacing(folder / CONFIG_NAME) as temporary:
            # Read again: another stage may have been exported here meanwhile.
            temporary.write_text(_config_with(folder, stage, entry), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write model folder {folder}: {paths.reason(error)}") from error


def standing_on(folder: Path, stage: str) -> dict[str, str]:
    """The folder's stages that were trained with its `stage` (the CLIP) -> the hash of that."""
    if not (folder / CONFIG_NAME).exists():
        return {}
    entries = read_config(folder)["stages"]
    return {name: entry[stage] for name, entry in sorted(entries.items()) if entry.get(stage)}


def _check_standing(folder: Path, stage: str, new_hash: str) -> None:
    if lost := [name for name, on in standing_on(folder, stage).items() if on != new_hash]:
        raise UserError(
            f"{folder} holds {' and '.join(lost)}, trained with another {stage} than this one, "
            "which would replace it: give another folder (--config.export_to)"
        )


def _config_with(folder: Path, stage: str, entry: Mapping[str, Any]) -> str:
    """The text of the folder's `config.json` with `entry` for the stage."""
    config = read_config(folder) if (folder / CONFIG_NAME).exists() else {"stages": {}}
    stages = config["stages"] | {stage: dict(entry)}
    config |= {"format": FORMAT, "version": __version__, "stages": stages}
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def stage_hash(folder: str | os.PathLike[str], stage: str) -> str:
    """16 hex digits that name a stage's tensors: sha256 of its file."""
    path = stage_path(folder, stage)
    try:
        stat = path.stat()
        return _file_hash(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """Kept while the file has this size and time: CLIP's is asked for by each stage on it."""
    del size, mtime_ns
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """16 hex digits that name the model: sha256 over its stages' entries and tensors."""
    stages = read_config(folder)["stages"]
    named = {stage: (entry, stage_hash(folder, stage)) for stage, entry in stages.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def stage_path(folder: str | os.PathLike[str], stage: str) -> Path:
    """Returns the path of a stage's tensors."""
    return paths.to_path(folder) / f"{stage}.safetensors"


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping -> {"a.b": leaf}; a name with a dot in it could not be read back."""
    flat = traverse_util.flatten_dict(params)
    for path in flat:
        if any("." in part for part in path):
            raise ValueError(f"parameter {path}: a name with a dot cannot be stored")
    return {".".join(path): leaf for path, leaf in flat.items()}


def _to_storage(name: str, tensor: Any, dtype: Any) -> np.ndarray:
    array = np.asarray(jax.device_get(tensor))
    if jnp.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # told below, by name
            array = array.astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise UserError(
                f"tensor {name} is not finite in {np.dtype(dtype).name}: "
                "train again, or store bfloat16 if it was float16"
            )
    return np.ascontiguousarray(array).reshape(array.shape)  # safetensors writes raw memory


def _to_memory(array: np.ndarray) -> np.ndarray:
    floating = jnp.issubdtype(array.dtype, np.floating)
    return array.astype(np.float32) if floating else array
