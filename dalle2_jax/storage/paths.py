"""Paths in a bucket beside those of this machine: gs://BUCKET/FOLDER wherever a path is taken.

`to_path` gives pathlib's own for a local name and universal_pathlib's for gs://, which has the same
methods and, through fsspec, needs no TensorFlow. What must be a file of this machine, such as
weights to map, is copied first (`local_copy`).
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from dalle2_jax.errors import UserError

INSTALL = "in the project's folder, pip install -e '.[gcs]'"
_INDEX = ".copy.json"
_AT_ONCE = 256  # files fetched between two writings of the index


def is_remote(name: object) -> bool:
    """Returns whether a path or its name is an address, such as gs://bucket/folder."""
    return "://" in str(name)


def to_path(name: str | os.PathLike[str] | Path) -> Path:
    """A path by its name; an object that is one already is given back.

    Raises UserError for an address that is not gs://, and where gcsfs is not installed.
    """
    if not is_remote(name):
        return Path(name)
    if not isinstance(name, str):
        return cast(Any, name)
    if not name.startswith("gs://") or not name.removeprefix("gs://").strip("/"):
        raise UserError(f"{name}: name a folder of this machine or gs://BUCKET/FOLDER")
    try:
        import fsspec
        from upath import UPath

        # It prints the traceback of every error that it raises too, which is told in one line here.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise UserError(f"{name} needs gcsfs: {INSTALL}") from None
    # Another host may have written since: listings are asked for anew.
    return cast(Any, UPath(name.rstrip("/"), use_listings_cache=False))


def reason(error: BaseException) -> str:
    """Returns the message of a file system's error, local or not, as one line."""
    told = getattr(error, "strerror", None) or error
    return " ".join(str(told).split())[:300] or type(error).__name__


@contextlib.contextmanager
def as_user_error(what: str, path: object) -> Iterator[None]:
    """Raises errors of a bucket's client (no permission, no network), of many kinds, as UserError.

    Errors over a local path pass through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_remote(path):
            raise
        raise UserError(f"{what} {path}: {reason(error)}") from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; a bucket has no folders, and none is made for it."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def move(source: Path, target: Path) -> None:
    """Moves a file or a folder to a name that is not there; in a bucket by copying."""
    if is_remote(source):
        with as_user_error("cannot move", source):
            cast(Any, source).fs.mv(cast(Any, source).path, cast(Any, target).path, recursive=True)
    else:
        source.rename(target)


def upload(source: Path, target: Path) -> None:
    """Copies a local file into the bucket; an object appears whole or not at all."""
    # Not by `open`, which would leave half of it where reading ends in an error.
    cast(Any, target).fs.put_file(str(source), cast(Any, target).path)


def local_copy(folder: Path, patterns: Sequence[str] = ()) -> Path:
    """The folder of this machine's cache that holds `folder`'s files, brought up to date.

    All that lies below it but hidden files; with `patterns` only what lies right in it and fits one
    of them. What did not change since the last time is not fetched again, what went away goes away.
    Raises UserError where the bucket cannot be read or there is no such folder in it.
    """
    fs, root = cast(Any, folder).fs, cast(Any, folder).path.rstrip("/")
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    copy = cache() / "gs" / name / (folder.name or "bucket")
    copy.mkdir(parents=True, exist_ok=True)
    with as_user_error("cannot read", folder), only_process(copy):
        there = {}
        for path, info in fs.find(root, maxdepth=1 if patterns else None, detail=True).items():
            name = path.removeprefix(root).lstrip("/")
            hidden = any(part.startswith(".") for part in name.split("/"))
            if name and not hidden and any(fnmatch.fnmatch(name, p) for p in patterns or "*"):
                there[name] = _version(info)
        if not there:
            raise UserError(f"{folder} does not exist or holds nothing to read")
        index = copy / _INDEX
        have = json.loads(index.read_text()) if index.exists() else {}
        for name in [n for n in have if n not in there]:
            (copy / name).unlink(missing_ok=True)
        have = {name: version for name, version in have.items() if name in there}
        missing = [n for n in there if have.get(n) != there[n] or not (copy / n).exists()]
        for start in range(0, len(missing), _AT_ONCE):
            names = missing[start : start + _AT_ONCE]
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get([f"{root}/{n}" for n in names], [str(copy / n) for n in names])
            have |= {name: there[name] for name in names}
            _write_index(index, have)
        _write_index(index, have)
    return copy


def users_cache() -> Path | None:
    """The user's folder of what can be made again, which may not be there yet; None for a user
    without a home, as in a container."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax"
    except RuntimeError:
        return None


def cache() -> Path:
    """`users_cache`, or a folder of this machine in its place."""
    above = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return users_cache() or above / "dalle2_jax"


def _version(info: dict[str, Any]) -> str:
    """Returns what changes when an object is written again."""
    marks = [info.get(key) for key in ("size", "generation", "etag", "crc32c", "md5Hash", "mtime")]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _write_index(path: Path, have: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(have, file)
    os.replace(file.name, path)


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """One process of this machine at a time writes in the folder above `folder`."""
    with open(folder.parent / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the others wait, and find all there
        yield
