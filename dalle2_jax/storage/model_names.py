"""A model's name -> its folder on this machine.

A name is that of a model in the package ("tiny"), a folder, an address in a bucket, or a hub id
"owner/name". A packaged name goes before a folder of the same name, which is written "./tiny".
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.storage import cache, licence, paths
from dalle2_jax.storage.model_folder import CONFIG_NAME, read_config

PACKAGED = Path(__file__).parent.parent / "weights"
SETTINGS = ("*.json", "*.txt", "*.md", "LICENSE*")
"""Patterns of everything but tensors in a model of any program: little to download."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a model, fetched from the hub or a bucket if it is there.

    What a former call has fetched is not fetched again unless it has changed.

    Raises:
        UserError: no model has this name, or the hub or the bucket cannot be reached.
    """
    if path := find_without_hub(name):
        return path
    hub_id = os.fspath(name)
    # Its config first: a model of another program would be downloaded in vain.
    read_config(download(hub_id, SETTINGS), hub_id)
    return download(hub_id)


def find_without_hub(name: str | os.PathLike[str]) -> Path | None:
    """Returns what `resolve` does, but None for a hub id. Raises UserError likewise."""
    text = os.fspath(name)
    if text in packaged():
        return PACKAGED / text
    if paths.is_remote(text):
        return cache.local_copy(paths.to_path(text), (CONFIG_NAME, licence.NAME, "*.safetensors"))
    try:
        path = Path(name).expanduser()
        if text and path.is_dir():
            return path
        if path.is_file():
            raise UserError(f"{name} is a file: give the model folder that holds {CONFIG_NAME}")
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that is missing
        raise UserError(f"cannot look for model {text!r}: {error}") from error
    if not _HUB_ID.fullmatch(text):
        names = ", ".join(map(repr, packaged())) or "none in this package"
        raise UserError(
            f"no model {text!r}: give a folder that holds {CONFIG_NAME}, a packaged model "
            f"({names}) or a hub id 'owner/name'"
        )
    return None


def packaged() -> list[str]:
    """Returns the names of the models in the package."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{CONFIG_NAME}"))


def download(
    hub_id: str, patterns: Sequence[str] = (CONFIG_NAME, "*.safetensors", "*.md", licence.NAME)
) -> Path:
    """Downloads the files of a model on the hub that match one of `patterns`; returns their folder.

    Raises:
        UserError: the hub has no such model or cannot be reached, or huggingface_hub is missing.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"no folder {hub_id!r} here; to look for it on the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client lets errors of many libraries through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no folder {hub_id!r} here, and the hub does not give it ({reason})"
        ) from error
