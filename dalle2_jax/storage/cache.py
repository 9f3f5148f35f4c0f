"""The cache on this machine: what can be made or fetched again, such as copies from a bucket."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dalle2_jax.errors import UserError
from dalle2_jax.storage.paths import as_user_error, has_no_locks

_INDEX = ".copy.json"  # {file: version} of what a copy holds
_FILES_AT_ONCE = 256  # fetched between two writings of the index, so that a killed run resumes


def user_folder() -> Path | None:
    """Returns the cache folder in the user's home, which may not exist yet.

    None for a user without a home, as in some containers.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax"
    except RuntimeError:
        return None


def folder() -> Path:
    """Returns the user's cache folder, or one for temporary files if the user has no home."""
    temporary = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}" / "dalle2_jax"
    return user_folder() or temporary


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine at a time make `path`; others wait, then find it made.

    The folder that holds `path` must exist. Where its file system has no locks, nobody waits: two
    processes may then make the same thing, each whole.
    """
    with open(path.parent / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, even by a kill
        except OSError as error:
            if not has_no_locks(error):
                raise
        yield


def local_copy(remote_folder: Path, patterns: Sequence[str] = ()) -> Path:
    """Returns a folder in the cache with the files of a folder in a bucket, brought up to date.

    An index beside the files holds the version of each, so that only what has changed in the
    bucket is fetched; what was removed there is removed here.

    Args:
        remote_folder: as `to_path` returns it for gs://.
        patterns: if given, only files directly in the folder whose names match one are copied;
            else all files below it. Hidden ones never are.

    Raises:
        UserError: the bucket cannot be read, or holds no such file.
    """
    fs, root = cast(Any, remote_folder).fs, cast(Any, remote_folder).path.rstrip("/")
    # Folders of one name in two buckets must not share a copy.
    address_hash = hashlib.sha256(str(remote_folder).encode()).hexdigest()[:16]
    copy = folder() / "gs" / address_hash / (remote_folder.name or "bucket")
    copy.mkdir(parents=True, exist_ok=True)
    with as_user_error("cannot read", remote_folder), locked(copy):
        remote = _remote_versions(fs, root, patterns)
        if not remote:
            raise UserError(f"{remote_folder} does not exist or holds nothing to read")
        index = copy / _INDEX
        # An index of a killed run lists only what was fetched completely.
        local = json.loads(index.read_text()) if index.exists() else {}
        for name in local.keys() - remote.keys():
            (copy / name).unlink(missing_ok=True)
        local = {name: version for name, version in local.items() if name in remote}
        outdated = [
            name
            for name, version in remote.items()
            if local.get(name) != version or not (copy / name).exists()
        ]
        for start in range(0, len(outdated), _FILES_AT_ONCE):
            names = outdated[start : start + _FILES_AT_ONCE]
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get([f"{root}/{name}" for name in names], [str(copy / name) for name in names])
            local.update({name: remote[name] for name in names})
            _write_index(index, local)
        _write_index(index, local)
    return copy


def _remote_versions(fs: Any, root: str, patterns: Sequence[str]) -> dict[str, str]:
    """Returns {name: version} of the files below `root` that are to be copied."""
    versions = {}
    for path, info in fs.find(root, maxdepth=1 if patterns else None, detail=True).items():
        name = path.removeprefix(root).lstrip("/")
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        matches = not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        if name and not is_hidden and matches:
            versions[name] = _version(info)
    return versions


def _version(info: Mapping[str, Any]) -> str:
    """Returns a hash of those properties of an object that change when it is written again."""
    keys = ("size", "generation", "etag", "crc32c", "md5Hash", "mtime")  # each store has some
    marks = [info.get(key) for key in keys]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _write_index(path: Path, versions: Mapping[str, str]) -> None:
    # By renaming, as in `atomic`: half an index would be no JSON.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(versions, file)
    os.replace(file.name, path)
