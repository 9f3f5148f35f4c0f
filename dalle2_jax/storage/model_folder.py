"""A model folder: `config.json` and one `<stage>.safetensors` for each stage.

    model/
      config.json            {"format": 1, "version": "0.1.0", "stages": {"clip": {...}, ...}}
      clip.safetensors       {"text.blocks.attn.kernel": float32 [...], ...}
      prior.safetensors
      ...
      LICENSE.txt            if the weights come under one, see `licence`

Training and importing write it, sampling reads it. Nothing in it can run code. A stage's entry in
`config.json` holds what is needed to build its network and to sample from it. Its tensors are
named by their path in the nested parameters, joined by dots; on disk floating ones are float32,
float16 or bfloat16, in memory always float32.

A prior or a decoder works only with the CLIP whose embeddings it was trained on, so its entry names
the hash of that CLIP's file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
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
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import remove_stale, replacing
from dalle2_jax.validation import checks
from dalle2_jax.version import __version__

FORMAT = 1
CONFIG_NAME = "config.json"
StorageDtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_MOST_NAMED = 3  # tensors in one message


def stage_path(folder: str | os.PathLike[str], stage: str) -> Path:
    """Returns the path of a stage's tensors."""
    return paths.to_path(folder) / f"{stage}.safetensors"


def read_config(folder: str | os.PathLike[str], name: str = "") -> dict[str, Any]:
    """Returns the folder's `config.json`, {"format": 1, "version": ..., "stages": {stage: entry}}.

    Messages call the folder `name`, if given: it may be the copy of a model on the hub.

    Raises:
        UserError: there is no such folder, it is another program's model, or the file is damaged.
    """
    path = paths.to_path(folder) / CONFIG_NAME
    name = name or str(folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UserError(f"model folder {folder} does not exist") from None
        if (path.parent / "model_index.json").exists():
            raise UserError(_foreign_model(name, "diffusers")) from None
        raise UserError(f"model folder {name} has no {CONFIG_NAME}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {paths.reason(error)}") from error
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, or nested without end
        raise UserError(f"{path} is not valid JSON ({error}): export the model again") from error
    _check_config(config, path, name)
    return config


def _check_config(config: Any, path: Path, name: str) -> None:
    """Raises UserError unless `config` is one of a model folder, of a format that is known."""
    if not isinstance(config, dict) or not isinstance(config.get("stages"), dict):
        if isinstance(config, dict) and config.get("model_type") == "clip":
            raise UserError(_foreign_model(name, "transformers"))
        if isinstance(config, dict) and "_class_name" in config:
            raise UserError(
                f"{path.parent} is one network of a model of diffusers: give the folder above it, "
                "which holds model_index.json"
            )
        raise UserError(f"{path} is not a model folder's config: it has no 'stages'")
    if not all(isinstance(entry, dict) for entry in config["stages"].values()):
        raise UserError(f"{path} is not a model folder's config: a stage is not an object")
    number = checks.whole_number(f"{path}: 'format'", config.get("format"), 1)
    if number > FORMAT:
        raise UserError(
            f"{path} has format {number}, written by dalle2-jax {config.get('version', '?')}; "
            f"this is {__version__}, which reads up to {FORMAT}: upgrade dalle2-jax"
        )


def _foreign_model(name: str, program: str) -> str:
    """Returns the message for a model that another program has saved."""
    return (
        f"{name} is a model of {program}, not a model folder: run "
        f"dalle2 weights import {name} --out FOLDER, and give FOLDER"
    )


def read_stage(folder: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """Returns a stage's entry in `config.json`; raises UserError if there is no such stage."""
    entries = read_config(folder)["stages"]
    if stage not in entries:
        names = ", ".join(sorted(entries)) or "none"
        raise UserError(f"model folder {folder} has no stage {stage!r}; it has: {names}")
    return entries[stage]


def read_params(folder: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """Returns a stage's tensors as a nested dict of NumPy arrays, floating ones in float32.

    Raises:
        UserError: there is no such folder or stage, or its file is missing or cut short.
    """
    read_stage(folder, stage)
    path = stage_path(folder, stage)
    try:
        tensors = load_file(path)
    except FileNotFoundError:  # safetensors raises it for a file without read permission, too
        fault = "may not be read" if os.path.exists(path) else "is missing"
        raise UserError(f"{path} {fault}, though {CONFIG_NAME} names the stage") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}): copy or export it again"
        ) from error
    flat = {name: _to_memory(tensor) for name, tensor in tensors.items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def check_params(params: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless `params` have the names and shapes of `expected`, nested alike.

    `where` is what the message calls the source of `params`.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in _flatten(params).items()}
    expected_shapes = {name: tuple(leaf.shape) for name, leaf in _flatten(expected).items()}
    faults = [
        *(f"{name} is missing" for name in sorted(expected_shapes.keys() - shapes.keys())),
        *(f"{name} is unknown" for name in sorted(shapes.keys() - expected_shapes.keys())),
        *(
            f"{name} is {shapes[name]}, not {shape}"
            for name, shape in expected_shapes.items()
            if name in shapes and shapes[name] != shape
        ),
    ]
    if faults:
        named, rest = faults[:_MOST_NAMED], len(faults) - _MOST_NAMED
        more = f" and {rest} more" if rest > 0 else ""
        raise UserError(f"{where} holds another network: {', '.join(named)}{more}")


def write_stage(
    folder: str | os.PathLike[str],
    stage: str,
    entry: Mapping[str, Any],
    params: Mapping[str, Any],
    dtype: StorageDtype = "float32",
) -> None:
    """Writes a stage into a model folder, which is made if it does not exist.

    Other stages stay as they are. Each file appears whole or not at all, the tensors first: a stage
    that `config.json` names always has its tensors.

    Args:
        folder: a folder on this machine or in a bucket.
        stage: the stage's name, lower-case.
        entry: what goes to config["stages"][stage], plain JSON values.
        params: a nested mapping of arrays.
        dtype: how floating arrays are stored.

    Raises:
        UserError: the folder cannot be written, a value is not finite in `dtype`, or other stages
            in the folder were trained with the CLIP that this one would replace.
        ValueError: a name that cannot be stored.
    """
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"stage name {stage!r}: use lower-case letters, digits and _")
    checks.one_of("storage dtype", dtype, _DTYPES)
    folder = paths.to_path(folder)
    _config_text(folder, stage, entry)  # raises what is wrong with it before anything is written
    tensors = {
        name: _to_storage(name, tensor, _DTYPES[dtype]) for name, tensor in _flatten(params).items()
    }
    # An OSError over a local folder is reported below, any error of a bucket by `as_user_error`.
    try:
        paths.make_folder(folder)
        remove_stale(folder)
        with paths.as_user_error("cannot write model folder", folder):
            with replacing(stage_path(folder, stage)) as temporary:
                # One entry of metadata: the order of several would differ from run to run.
                save_file(tensors, temporary, metadata={"stage": stage})
                # Only now is the hash known; raising here leaves the old file in place.
                _check_dependents(folder, stage, _hash(temporary))
            with replacing(folder / CONFIG_NAME) as temporary:
                # Read again: another process may have exported a stage here meanwhile.
                temporary.write_text(_config_text(folder, stage, entry), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write model folder {folder}: {paths.reason(error)}") from error


def dependents(folder: Path, stage: str) -> dict[str, str]:
    """Returns the folder's stages that were trained with its `stage`, the CLIP, and its hash then.

    A folder that does not exist yet has none.
    """
    if not (folder / CONFIG_NAME).exists():
        return {}
    entries = read_config(folder)["stages"]
    return {name: entry[stage] for name, entry in sorted(entries.items()) if entry.get(stage)}


def _check_dependents(folder: Path, stage: str, new_hash: str) -> None:
    """Raises UserError if a stage in the folder works only with another `stage` than the new."""
    lost = [name for name, old_hash in dependents(folder, stage).items() if old_hash != new_hash]
    if lost:
        raise UserError(
            f"{folder} holds {' and '.join(lost)}, trained with another {stage} than this one, "
            "which would replace it: give another folder (--config.export_to)"
        )


def _config_text(folder: Path, stage: str, entry: Mapping[str, Any]) -> str:
    """Returns the text of the folder's `config.json` with `entry` for the stage."""
    config = read_config(folder) if (folder / CONFIG_NAME).exists() else {"stages": {}}
    new_config = {
        **config,
        "format": FORMAT,
        "version": __version__,
        "stages": {**config["stages"], stage: dict(entry)},
    }
    return json.dumps(new_config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def stage_hash(folder: str | os.PathLike[str], stage: str) -> str:
    """Returns 16 hex digits that identify a stage's tensors: of the sha256 of their file.

    Raises UserError if the file cannot be read.
    """
    path = stage_path(folder, stage)
    try:
        stat = path.stat()
        return _cached_hash(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=64)
def _cached_hash(path: Path, size: int, mtime_ns: int) -> str:
    """Returns `_hash` of a file, computed once while it has this size and time.

    Every stage that was trained with a CLIP asks for the hash of that large file.
    """
    del size, mtime_ns
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """Returns 16 hex digits that identify the model: of the sha256 of its entries and tensors."""
    entries = read_config(folder)["stages"]
    contents = {stage: (entry, stage_hash(folder, stage)) for stage, entry in entries.items()}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested mapping as {"a.b": leaf}; raises ValueError for a name with a dot."""
    flat = traverse_util.flatten_dict(params)
    for path in flat:
        if any("." in part for part in path):  # it could not be read back
            raise ValueError(f"parameter {path}: a name with a dot cannot be stored")
    return {".".join(path): leaf for path, leaf in flat.items()}


def _to_storage(name: str, tensor: Any, dtype: Any) -> np.ndarray:
    """Returns a tensor as it is stored; raises UserError if it is not finite in `dtype`."""
    array = np.asarray(jax.device_get(tensor))
    if jnp.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            array = array.astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise UserError(
                f"tensor {name} is not finite in {np.dtype(dtype).name}: "
                "train again, or store bfloat16 if it was float16"
            )
    # safetensors writes memory as it is, and so would write a transposed view in the wrong order.
    return np.ascontiguousarray(array).reshape(array.shape)


def _to_memory(array: np.ndarray) -> np.ndarray:
    """Returns a stored tensor as the networks hold it."""
    floating = jnp.issubdtype(array.dtype, np.floating)
    return array.astype(np.float32) if floating else array
