"""The sha256 of every file of a checkpoint, inside it: no changed bit goes unnoticed.

Orbax keeps no checksum of array data. A checkpoint is completed in a temporary folder of Orbax's:
the classes here list the files there once the arrays of all hosts have been written, and only then
let Orbax commit, on a disk by renaming the folder, in a bucket by a last file. So a committed
checkpoint always has its manifest, and one without is damaged. Only Orbax's own mark of the commit,
whose content nobody reads, is not listed.

In a bucket process 0 reads back what all hosts wrote, and does so again before it is restored.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint.path import atomicity

from dalle2_jax.storage import paths

NAME = "manifest.json"
_SMALL = 2**16  # bytes
_BLOCK = 2**20
_THREADS = 16  # a bucket answers late; sha256 itself takes few
_ORBAX_METADATA = "_CHECKPOINT_METADATA"


def write(folder: Path) -> None:
    """Lists the files in `folder`, replacing the list of an earlier attempt."""
    (folder / NAME).unlink(missing_ok=True)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=str)
    names = [p.as_posix().removeprefix(folder.as_posix() + "/") for p in files]
    entries = zip(_each(_size, files), _each(_sha256, files), strict=True)
    (folder / NAME).write_text(json.dumps(dict(zip(names, entries, strict=True)), indent=1))


def fault(folder: Path, read_all: bool = True) -> str:
    """Returns one line on what is wrong with a checkpoint, or "".

    Without `read_all` large files are not read, only their sizes compared. An OSError that says
    nothing about the file (no permission, a failing disk) passes through.
    """
    try:
        listed = sorted(json.loads((folder / NAME).read_bytes()).items())
        # Sizes first: they are cheap, and a file that was cut short is the usual damage.
        sizes = _each(_size, [folder / name for name, _ in listed])
        for (name, (size, _)), found in zip(listed, sizes, strict=True):
            if found != size:
                return f"{name} has {found} bytes, not {size}"
        read = [(name, expected) for name, (size, expected) in listed if read_all or size < _SMALL]
        hashes = _each(_sha256, [folder / name for name, _ in read])
        for (name, expected), found in zip(read, hashes, strict=True):
            if found != expected:
                return f"{name} is not what was written (its sha256 differs)"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename or str(error)).name} is missing"
    except (ValueError, AttributeError, TypeError):
        return f"{NAME} is damaged"
    return "" if listed else f"{NAME} is empty"


def unfinished(folder: Path) -> bool:
    """Returns whether a killed run was writing the checkpoint into a bucket.

    On a disk an unfinished one has another name. Orbax removes it, as it would one that only lost
    the mark of its commit; that case is repaired.
    """
    mark = folder / atomicity.COMMIT_SUCCESS_FILE
    if not paths.is_remote(folder) or mark.exists():
        return False
    if not (folder / NAME).exists():
        return True
    mark.write_text("")
    return False


def _each(work: Callable[[Path], Any], files: Sequence[Path]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, files))


def _size(path: Path) -> int:
    return path.stat().st_size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


async def _list_files(temporary: Any) -> None:
    """Writes the manifest of a checkpoint before Orbax finalizes it, for both classes.

    Orbax calls `finalize` on process 0 alone, when all hosts have written, and also once for each
    part of a checkpoint.
    """
    # Orbax's `finalize` would write the time of the commit into a file that is hashed by then. So
    # that is done here, and without its store Orbax does not do it again.
    if store := temporary._checkpoint_metadata_store:
        await asyncio.to_thread(_tell_time, store, temporary.get() / _ORBAX_METADATA)
        temporary._checkpoint_metadata_store = None
    if temporary.get_final().name.isdigit():  # not a part, which has a name
        await asyncio.to_thread(write, paths.to_path(str(temporary.get())))


class RenamedFolder(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, with a manifest before it is renamed to its final name."""

    async def finalize(self) -> None:
        await _list_files(self)
        await super().finalize()


class CommittedFolder(atomicity.CommitFileTemporaryPath):
    """Orbax's folder in a bucket, with a manifest before the file that marks it as complete."""

    async def finalize(self) -> None:
        await _list_files(self)
        await super().finalize()


def _tell_time(store: Any, path: Any) -> None:
    store.wait_until_finished()
    store.update(file_path=path, commit_timestamp_nsecs=time.time_ns())
    store.wait_until_finished()
