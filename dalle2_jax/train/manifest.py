"""The sha256 of every file of a checkpoint, inside it: no change of a bit goes unseen.

Orbax keeps no checksum over array data. Its temporary folder is where a checkpoint becomes whole:
the class here lists the files there, once the arrays of all hosts have been written, and only
then lets Orbax commit. So a committed checkpoint always has its manifest, and one without is
damaged. Outside the manifest stands only Orbax's own mark of the commit, whose content nobody
reads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from orbax.checkpoint.path import atomicity

NAME = "manifest.json"
_SMALL = 2**16  # bytes
_BLOCK = 2**20
_ORBAX_METADATA = "_CHECKPOINT_METADATA"


def write(folder: Path) -> None:
    """Lists the files in `folder`; one of an earlier attempt is replaced."""
    (folder / NAME).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_sha256, files)
        listed = {
            str(path.relative_to(folder)): [path.stat().st_size, digest]
            for path, digest in zip(files, hashes, strict=True)
        }
    (folder / NAME).write_text(json.dumps(listed, indent=1))


def fault(folder: Path, read_all: bool = True) -> str:
    """What is wrong with a checkpoint, one line, or "" where nothing is.

    Without `read_all` large files are not read, but their sizes are compared. An OSError that
    tells nothing of the file (no permission, a failing disk) goes through.
    """
    try:
        listed = json.loads((folder / NAME).read_bytes())
        for name, (size, digest) in sorted(listed.items()):
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if (read_all or size < _SMALL) and _sha256(path) != digest:
                return f"{name} is not what was written (its sha256 differs)"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError, TypeError):
        return f"{NAME} is damaged"
    return "" if listed else f"{NAME} is empty"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class RenamedFolder(atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, with a manifest before it is renamed to what it is to be.

    Orbax calls `finalize` on process 0 alone, when all hosts have written.
    """

    async def finalize(self) -> None:
        if store := self._checkpoint_metadata_store:  # its last word comes before the hashes
            await asyncio.to_thread(_tell_time, store, self.get() / _ORBAX_METADATA)
            self._checkpoint_metadata_store = None
        if atomicity.TMP_DIR_SUFFIX not in self.get().parent.name:  # not one of its parts
            await asyncio.to_thread(write, Path(self.get()))
        await super().finalize()


def _tell_time(store: Any, path: Any) -> None:
    store.wait_until_finished()
    store.update(file_path=path, commit_timestamp_nsecs=time.time_ns())
    store.wait_until_finished()
