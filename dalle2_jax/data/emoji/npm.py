"""Files from npm packages, pinned by version and sha256 and kept in the user's cache.

The packages are fetched with the npm client (`npm pack`), so a mirror or a proxy that is set up for
npm is used here too. A tarball is read in place: nothing in it is unpacked or run.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any

from dalle2_jax.errors import UserError

_TIMEOUT_SECONDS = 900
_MIN_FREE_BYTES = 32 * 2**20  # the largest package, twice


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package: `name`, exact `version`, sha256 of its tarball in hexadecimal."""

    name: str
    version: str
    sha256: str

    @property
    def pin(self) -> str:
        """`name@version`, as npm takes it."""
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the tarball: `@scope/name` becomes `scope-name`."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def cache_dir() -> pathlib.Path:
    """Returns `npm` in `$DALLE2_JAX_CACHE`, or in `$XDG_CACHE_HOME/dalle2_jax` (`~/.cache/...`)."""
    cache = os.environ.get("DALLE2_JAX_CACHE")
    if cache:
        return pathlib.Path(cache).expanduser() / "npm"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "dalle2_jax" / "npm"


def fetch(package: Package, cache: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the path of the package's verified tarball, fetched if the cache does not hold it.

    Args:
      package: what to fetch.
      cache: the folder to keep it in; `cache_dir()` if None.

    Raises:
      UserError: npm is missing or fails, the sha256 differs, or `cache` cannot be written.
    """
    cache = cache_dir() if cache is None else cache
    target = cache / package.file_name
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Fetched into a folder of its own and moved when verified, so that two processes do not see
        # each other's half of a tarball.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temp:
            tarball = _npm_pack(package, pathlib.Path(temp))
            sha256 = _sha256(tarball)
            if sha256 != package.sha256:
                raise UserError(
                    f"{package.pin}: sha256 of the tarball is {sha256}, expected {package.sha256}: "
                    "the download is damaged or not the pinned package; try again or check the "
                    "registry npm is set to"
                )
            os.replace(tarball, target)
    except OSError as e:
        raise UserError(disk_error(e, cache)) from e
    return target


def read_json(tarball: pathlib.Path, member: str) -> Any:
    """Reads the JSON value in `package/<member>` of a tarball; KeyError if it has no such file."""
    with tarfile.open(tarball, "r:gz") as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise KeyError(f"{tarball}: package/{member} is not a file")
        return json.load(file)


def disk_error(e: OSError, path: pathlib.Path) -> str:
    """Returns one line that explains a failed write under `path`, and what to do."""
    if e.errno == errno.ENOSPC:
        return f"{path}: the disk is full; free some space or choose another folder"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: no permission to write there; choose another folder"
    return f"{path}: cannot be written ({e.strerror or e})"


def _npm_pack(package: Package, folder: pathlib.Path) -> pathlib.Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is not installed, and {package.pin} is fetched with it: install Node.js "
            "(Debian: apt install npm; macOS: brew install node) and run again"
        )
    try:
        run = subprocess.run(
            # --ignore-scripts: a package's own scripts must never run here.
            [npm, "pack", package.pin, "--silent", "--ignore-scripts"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"{package.pin}: npm pack took over {_TIMEOUT_SECONDS} s; try again") from e
    tarball = folder / package.file_name
    if run.returncode != 0 or not tarball.is_file():
        if shutil.disk_usage(folder).free < _MIN_FREE_BYTES:  # npm does not say so
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        output = " ".join((run.stderr or run.stdout).split())[-300:]
        raise UserError(
            f"{package.pin}: npm pack failed (exit {run.returncode}); is the network up? "
            f"npm wrote: {output or 'nothing'}"
        )
    return tarball


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
