"""Other programs' models -> a model folder."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import names, recognise, sources
from dalle2_jax.sampling import load
from dalle2_jax.storage import licence, model_folder, paths
from dalle2_jax.storage.atomic import STALE_SECONDS

_UNFINISHED = ".unfinished"  # how the name of a folder ends that is being written


def import_model(source: Path, out: Path, dtype: model_folder.StorageDtype | None = None) -> None:
    """Writes the model in `source` as a model folder, which appears whole or not.

    Tensors are stored as `dtype`; None: in the narrowest that loses nothing of a stage. Every
    tensor of the source goes to one place and every parameter is filled; a stage is in memory once.
    Raises UserError where that is not so, with what is left on either side, and for what is missing
    or damaged.
    """
    stages = recognise.stages(source)
    entries = {stage.name: dict(stage.entry) for stage in stages}
    with appearing(out) as folder:
        for stage in stages:
            params, stored = convert(source, stage, entries, dtype)
            # These learned on CLIP's embeddings: another CLIP beside them would be noise to them.
            if stage.name in ("prior", "decoder"):
                entries[stage.name]["clip"] = model_folder.stage_hash(folder, "clip")
            logging.info("%s: %s", stage.name, ", ".join(map(str, stage.parts.values())))
            entry = entries[stage.name]
            model_folder.write_stage(folder, stage.name, entry, params, stored)
        licence.add(recognise.licence_of(source), folder)


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yields a folder that takes the name `out` if the block ends well, and goes if not.

    Raises UserError where it cannot be written, or there is something of that name.
    """
    try:
        check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        # Beside `out`, on its file system, so that the last step is a rename, which is atomic.
        with tempfile.TemporaryDirectory(_UNFINISHED, f".{out.name}.", out.parent) as above:
            folder = Path(above) / out.name
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {paths.reason(error)}") from error


def check_free(out: Path) -> None:
    """Raises UserError where there is something of that name, or none can be."""
    try:
        taken = out.exists()
    except OSError as error:
        raise UserError(f"cannot write {out}: {paths.reason(error)}") from error
    if taken:
        raise UserError(f"{out} is there already: give another folder, or remove it")


def _remove_stale(out: Path) -> None:
    """Removes what a killed process left beside `out`, an hour ago or more."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{_UNFINISHED}"):
        newest = max(path.lstat().st_mtime for path in (left, *left.rglob("*")))
        if left.is_dir() and time.time() - newest > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def convert(
    source: Path,
    stage: sources.Stage,
    entries: Mapping[str, Any],
    dtype: model_folder.StorageDtype | None = None,
) -> tuple[dict[str, Any], model_folder.StorageDtype]:
    """Returns the parameters of one of the source's stages, nested, and their type on disk.

    `dtype` and UserError are as in `import_model`.
    """
    # Nothing is read yet: each tensor is a function that reads it.
    readers: sources.Tensors = {}
    for name, path in stage.parts.items():
        for tensor, read in sources.network(path).items():
            readers[f"{name}/{tensor}"] = read
    where = f"{source}: {stage.name}"
    try:
        converted = names.to_ours(stage.rules, readers, lambda name: readers[name]())
    except UserError as error:
        raise UserError(f"{where} is another network: {error}") from error
    # The settings that were read from the source say which tensors our network of them has. Names
    # and shapes must be exactly those: what is left over would be another network.
    shapes: Any = load.expected_params(entries, stage.name, where)
    expected: dict[str, Any] = traverse_util.flatten_dict(shapes, sep=".")
    missing = sorted(expected.keys() - set(converted.names))
    unknown = sorted([*converted.unknown, *(set(converted.names) - expected.keys())])
    if missing or unknown:
        raise UserError(
            f"{where} is another network{_some(unknown, 'unknown')}{_some(missing, 'missing')}"
        )
    flat = {}
    for name in expected:
        tensor = converted.tensor(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{where}: {name} is of {tensor.dtype}, which no weights are")
        if tensor.shape != expected[name].shape:
            message = f"{name} is {tensor.shape}, not {expected[name].shape}"
            raise UserError(f"{where} is another network: {message}")
        if not np.isfinite(tensor).all():
            raise UserError(f"{where}: {name} is not finite: copy the model again")
        with np.errstate(over="ignore"):  # reported, by name, when the stage is written
            flat[name] = tensor.astype(jnp.dtype(dtype), copy=False) if dtype else tensor
    return traverse_util.unflatten_dict(flat, sep="."), _storage(flat)


def _some(names: list[str], what: str) -> str:
    """Returns the first of the names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; {what}: {', '.join(names[:3])}{more}" if names else ""


def _storage(tensors: Mapping[str, np.ndarray]) -> model_folder.StorageDtype:
    """Returns the narrowest type that loses nothing."""
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    if len(dtypes) == 1 and (only := dtypes.pop()) in ("float16", "bfloat16"):
        return only
    return "float32"
