"""Models by name: where another program's lies, and our model folder for any of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

from absl import logging

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import recognise
from dalle2_jax.pretrained.clip import OPEN_CLIP_WEIGHTS
from dalle2_jax.pretrained.convert import import_model
from dalle2_jax.pretrained.sources import SUFFIXES, WEIGHTS
from dalle2_jax.storage import cache, licence, model_names, paths
from dalle2_jax.version import __version__


def model(name: str | os.PathLike[str]) -> Path:
    """Returns the model folder of a name, as `model_names.resolve` finds it.

    Another program's model (`recognise.stages`) is imported into this machine's cache, the first
    time. The licence of a folder is shown, once. Raises UserError for what is no model, or damaged,
    a hub out of reach, and a disk that is full.
    """
    folder = _folder(name)
    if recognise.is_foreign(folder):
        folder = _imported(folder, Path(name).name)
    licence.show_once(folder)
    return folder


def source(name: str | os.PathLike[str]) -> Path:
    """Returns the folder or file of a model on this machine, another program's or ours.

    Raises UserError as `model` does.
    """
    path = os.path.expanduser(name)
    return Path(path) if os.path.isfile(path) else _folder(name)


def _folder(name: str | os.PathLike[str]) -> Path:
    text = os.fspath(name)
    if _foreign_bucket(text):
        return cache.local_copy(paths.to_path(text))
    if found := model_names.find_without_hub(name):
        return found
    folder = model_names.download(text, model_names.SETTINGS)
    if not recognise.is_foreign(folder):
        return model_names.resolve(text)
    # The settings that are here now say which networks are read. Only the tensors of these are
    # fetched, and as safetensors if there are any: a pickle of the same is as large again.
    left = {part for stage in recognise.stages(folder) for part in stage.parts.values()}
    for suffix in SUFFIXES:
        wanted = {part: _patterns(part.relative_to(folder), suffix) for part in left}
        model_names.download(text, sorted(itertools.chain.from_iterable(wanted.values())))
        left = {p for p, files in wanted.items() if not any(any(folder.glob(f)) for f in files)}
        if not left:
            break
    return folder


def _patterns(part: Path, suffix: str) -> list[str]:
    """Returns patterns of a network's files; `part` is their folder, or OpenCLIP's one file."""
    if part.suffix:
        return [str(part.parent / name) for name in OPEN_CLIP_WEIGHTS if name.endswith(suffix)]
    return [str(part / f"{stem}{shard}.{suffix}") for stem in WEIGHTS for shard in ("", "-*")]


def _foreign_bucket(name: str) -> bool:
    if not paths.is_remote(name):
        return False
    with paths.as_user_error("cannot read", name):
        return recognise.is_foreign(paths.to_path(name))


def _imported(source: Path, name: str) -> Path:
    """Returns the model folder in the cache that `source` was imported into, and imports it once.

    Its name holds a hash of the files' sizes and times, the settings, the licence and this
    program's version: if any of them changes, the model is imported anew.
    """
    stages = recognise.stages(source)
    entries = {stage.name: stage.entry for stage in stages}
    if "decoder" not in entries:
        raise UserError(
            f"{source} holds {' and '.join(entries)} alone, from which nothing is generated: "
            "import it, and train the others on it"
        )
    files = [
        p for stage in stages for part in stage.parts.values() for p in (part, *part.glob("*"))
    ]
    stats = {
        str(path.resolve()): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.exists()
    }
    terms = recognise.licence_of(source)
    identity = json.dumps([__version__, entries, stats, terms], sort_keys=True, default=str)
    mark = hashlib.sha256(identity.encode()).hexdigest()[:16]
    out = cache.folder() / "imported" / f"{name}-{mark}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(out):
            if not out.exists():
                logging.info("importing %s into %s, once", source, out)
                import_model(source, out)
    except OSError as error:
        raise UserError(f"cannot import {source} into {out}: {paths.reason(error)}") from error
    return out
