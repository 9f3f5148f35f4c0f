"""Files that appear whole or not at all, on this machine and in a bucket."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dalle2_jax.storage import paths

STALE_SECONDS = 3600  # nobody writes on without touching a file for so long


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well.

    The folder must exist; an OSError of the block or of the renaming goes through. For a bucket the
    file lies on this machine, and is uploaded.
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
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale(folder: Path, seconds: float = STALE_SECONDS) -> None:
    """Removes the temporary files that killed processes left in `folder` an hour ago or more, or
    `seconds`; in a bucket there are none."""
    if paths.is_remote(folder):
        return
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= seconds:
                left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
