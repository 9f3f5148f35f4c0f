"""The metadata of generated images: a Request as plain JSON, and back.

With the name and sha256 of each input in them, an image can be generated again from its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.modes import MODES_OF
from dalle2_jax.pipelines.request import InputImage, InputMask, Request, sha256_of
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.storage import paths
from dalle2_jax.validation import checks

FORMAT = 2  # of metadata; files before it hold less than a request


def to_metadata(request: Request) -> dict[str, Any]:
    """Returns the request as plain JSON values: the fields that its mode takes."""
    metadata: dict[str, Any] = {"format": FORMAT, "mode": request.mode}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name == "mode" or request.mode not in MODES_OF.get(field.name, (request.mode,)):
            continue
        if field.name == "images":
            value = [{"name": image.name, "sha256": image.sha256} for image in value]
        elif field.name == "mask" and value is not None:
            value = {"name": value.name, "sha256": value.sha256}
        elif field.name == "options":
            options = dataclasses.asdict(request.options)
            value = {k: _plain(v) for k, v in options.items() if v is not None}
        elif field.name == "prompts":
            value = list(request.prompts)
        metadata[field.name] = value
    return metadata


def from_metadata(
    metadata: Mapping[str, Any], folder: Path, **overrides: Any
) -> tuple[Request, tuple[int, int]]:
    """Returns the request that an image's metadata hold, and the (row, index) of the image.

    Args:
        metadata: as `to_metadata` and `Generated` have them.
        folder: of the image's file; inputs are looked for relative to it, then as they are named.
        **overrides: fields in place of the metadata's; inputs that they replace are not opened.

    Raises:
        UserError: metadata of an older version; an input that is missing or has changed.
    """
    if metadata.get("format") != FORMAT:
        raise UserError(
            "the file was written by an older version of dalle2_jax, whose metadata do not hold "
            "all that is needed to generate it again"
        )
    fields = {field.name for field in dataclasses.fields(Request)}
    values = {name: value for name, value in metadata.items() if name in fields}
    values["prompts"] = tuple(values.get("prompts", ()))
    values["options"] = SamplingOptions(**values.get("options", {}))
    options = values["options"]
    values.update(overrides)
    if "options" in overrides:
        changes = dataclasses.asdict(overrides["options"])
        changes = {name: value for name, value in changes.items() if value is not None}
        values["options"] = dataclasses.replace(options, **changes)
    if "images" not in overrides:
        values["images"] = tuple(_reopen(InputImage, i, folder) for i in values.get("images", ()))
    if "mask" not in overrides and values.get("mask") is not None:
        values["mask"] = _reopen(InputMask, values["mask"], folder)
    return Request(**values), (metadata["row"], metadata["index"])


def _reopen(kind: Any, entry: Mapping[str, str], folder: Path) -> Any:
    """Opens an input again; raises UserError if it is missing or has changed."""
    name = entry["name"]
    for path in (paths.to_path(folder) / name, paths.to_path(name)):
        if path.is_file():
            if sha256_of(path) != entry["sha256"]:
                raise UserError(
                    f"{path} has changed since the image was generated from it: name another file "
                    "for it, or restore it"
                )
            return kind.open(path, name)
    raise UserError(f"the input {name} is missing: name another file for it, or restore it")


def check_weights(metadata: Mapping[str, Any], model: DALLE2) -> None:
    """Raises UserError unless the model is the one that the metadata's image was generated with."""
    if metadata.get("hash") != model.weights_hash:
        raise UserError(
            f"the image was generated with the weights {metadata.get('weights')} "
            f"({metadata.get('hash')}), not {model.weights} ({model.weights_hash}): name those"
        )


def _plain(value: Any) -> Any:
    """Returns tuples as lists and scalars as Python's, also within {stage: value}."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    value = checks.to_python_values(value)
    return list(value) if isinstance(value, tuple) else value
