"""Paths on this machine and in a bucket: gs://BUCKET/FOLDER wherever a path is accepted.

`to_path` returns a `pathlib.Path` for a local name, and for gs:// a `UPath` of universal_pathlib,
which has the same methods and, through fsspec, needs no TensorFlow. The rest of the program calls
those methods and does not ask which one it has. The functions below are for the few operations that
differ between the two. What must be a file on this machine, such as weights that are mapped into
memory, is copied first: see `cache.local_copy`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from dalle2_jax.errors import UserError

INSTALL = "in the project's folder, pip install -e '.[gcs]'"


def is_remote(name: object) -> bool:
    """Returns whether a path or its name is an address, such as gs://bucket/folder."""
    return "://" in str(name)


def to_path(name: str | os.PathLike[str] | Path) -> Path:
    """Returns a path by its name. A leading ~ is the user's home, as a shell that saw it would say.

    Shells expand it at the start of a word alone, so not in `--out=~/images`.

    Raises:
        UserError: an address that is not gs://BUCKET/FOLDER, or gcsfs is not installed.
    """
    if not is_remote(name):
        return Path(os.path.expanduser(name))
    if not isinstance(name, str):
        return cast(Any, name)  # a UPath
    if not name.startswith("gs://") or not name.removeprefix("gs://").strip("/"):
        raise UserError(f"{name}: name a folder of this machine or gs://BUCKET/FOLDER")
    try:
        import fsspec
        from upath import UPath

        # gcsfs prints the traceback of every error that it raises; ours is one line.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise UserError(f"{name} needs gcsfs: {INSTALL}") from None
    # No cache of listings: another host may have written to the bucket since.
    return cast(Any, UPath(name.rstrip("/"), use_listings_cache=False))


def reason(error: BaseException) -> str:
    """Returns the message of a file system's error, local or remote, in one line."""
    text = getattr(error, "strerror", None) or error
    return " ".join(str(text).split())[:300] or type(error).__name__


@contextlib.contextmanager
def as_user_error(action: str, path: object) -> Iterator[None]:
    """Reports errors of a bucket's client within the block as a UserError, `action` `path`: why.

    Such a client raises errors of many kinds (no rights, no network), which have no class in
    common. Errors over a local path pass: they are OSErrors, which the caller reports.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_remote(path):
            raise
        raise UserError(f"{action} {path}: {reason(error)}") from error


def has_no_locks(error: OSError) -> bool:
    """Returns whether a lock failed because the file system has none: Lustre, NFS, some FUSE.

    Only EWOULDBLOCK (and EACCES, by POSIX) say that another process holds it.
    """
    return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EINTR)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. A bucket has no folders, so there it does nothing."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def prepare_folder(name: str | os.PathLike[str]) -> Path:
    """Makes a folder and checks that it can be written to, before work that would be lost.

    Raises UserError if it cannot, or if the name is empty.
    """
    if not str(name).strip():  # pathlib would take the current folder
        raise UserError("the folder to write to has no name: give one, or . for the current folder")
    path = to_path(name)
    if is_remote(path):
        with as_user_error("cannot write to the folder", path):
            # Rights to write are seen by writing only.
            (path / ".writable").write_bytes(b"")
            (path / ".writable").unlink()
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {error.strerror or error}") from error


def move(source: Path, target: Path) -> None:
    """Moves a file or a folder to a name that does not exist; in a bucket by copying."""
    if is_remote(source):
        with as_user_error("cannot move", source):
            cast(Any, source).fs.mv(cast(Any, source).path, cast(Any, target).path, recursive=True)
    else:
        source.rename(target)


def upload(source: Path, target: Path) -> None:
    """Copies a local file into a bucket, where it appears whole or not at all."""
    # Writing through `open` would leave half an object if reading the source fails.
    cast(Any, target).fs.put_file(str(source), cast(Any, target).path)
