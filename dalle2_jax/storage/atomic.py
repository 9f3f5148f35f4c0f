"""Writing a file whole or not at all, on this machine and in a bucket."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dalle2_jax.storage import paths

STALE_SECONDS = 3600
"""Age from which a temporary file is taken for the remains of a killed process. A living one
touches its file more often."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that becomes `path` when the block ends, unless it raises.

    On this machine the temporary file stands beside `path`, whose folder must exist, because only
    within one file system is renaming atomic: a reader sees the old file or the new one, never a
    part. For a bucket, where an object appears whole by itself, it is uploaded at the end.

    Raises:
        OSError: from the block, from making the temporary file or from renaming it.
    """
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            paths.upload(Path(folder) / path.name, path)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Without fsync, a crash of the machine after the renaming could leave an empty file.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it readable by its owner alone
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale(folder: Path, seconds: float = STALE_SECONDS) -> None:
    """Removes temporary files of killed processes from `folder`, if older than `seconds`.

    In a bucket there are none.
    """
    if paths.is_remote(folder):
        return
    for temporary in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it, too
            if time.time() - temporary.stat().st_mtime >= seconds:
                temporary.unlink()


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
