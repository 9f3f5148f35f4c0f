"""The metadata of generated images: a Request as plain JSON, and back.

The metadata hold what the request held, and the name and sha256 of each input in place of its
pixels. So an image can be generated again from its file alone, as long as its inputs are there:

    metadata = files.read_metadata("out/000-a-cat-s0-2.png")
    request, only = from_metadata(metadata, Path("out"))
    check_weights(metadata, model)
    image = next(e for e in run(model, request, only=only) if isinstance(e, Generated))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.modes import takes
from dalle2_jax.pipelines.request import InputImage, InputMask, Request, sha256_of
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.storage import paths
from dalle2_jax.validation import checks

FORMAT = 2  # version of the metadata; files before it hold less than a request
# Overrides that change how many images there are, so that a number among them means another one.
_CHANGE_THE_IMAGES = ("prompts", "n", "best_of", "frames")

Input = TypeVar("Input", InputImage, InputMask)


def to_metadata(request: Request) -> dict[str, Any]:
    """Returns the request as plain JSON values: the fields that its mode takes."""
    metadata: dict[str, Any] = {"format": FORMAT, "mode": request.mode}
    for field in dataclasses.fields(request):
        if field.name == "mode" or not takes(request.mode, field.name):
            continue
        value = getattr(request, field.name)
        if field.name == "images":
            value = [_entry(image) for image in value]
        elif field.name == "mask":
            value = None if value is None else _entry(value)
        elif field.name == "options":
            value = {k: _plain(v) for k, v in _set_options(value).items()}
        elif field.name == "prompts":
            value = list(value)
        else:
            value = _plain(value)
        metadata[field.name] = value
    return metadata


def from_metadata(
    metadata: Mapping[str, Any], folder: Path, **overrides: Any
) -> tuple[Request, tuple[int, int] | None]:
    """Returns the request that an image's metadata hold, and which of its images it is.

    Args:
        metadata: as `to_metadata` and `Generated` have them.
        folder: folder of the image's file. Inputs are looked for relative to it, then as named.
        **overrides: fields of the Request in place of the metadata's. Inputs that they replace are
            not opened; of `options`, those that are not None replace the metadata's.

    Returns:
        The request, and the (row, index) of the image; None stands for all images: the metadata are
        those of a grid, or an override changes how many images there are.

    Raises:
        UserError: metadata of an older version or damaged ones; an input that is missing or has
            changed; an override that the request's mode does not take.
    """
    check_format(metadata)
    # Metadata also hold what is no field of a request: settings, weights, version, label ...
    names = {field.name for field in dataclasses.fields(Request)}
    fields = {name: value for name, value in metadata.items() if name in names} | overrides
    try:
        fields["prompts"] = tuple(fields.get("prompts", ()))
        options = SamplingOptions(**metadata.get("options", {}))
        if "images" not in overrides:
            entries = metadata.get("images", ())
            fields["images"] = tuple(_reopen(InputImage, entry, folder) for entry in entries)
        if "mask" not in overrides and metadata.get("mask") is not None:
            fields["mask"] = _reopen(InputMask, metadata["mask"], folder)
        only = (int(metadata["row"]), int(metadata["index"])) if "row" in metadata else None
    except UserError:  # it is a ValueError
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the metadata of the file are damaged ({error!r})") from error
    if "options" in overrides:
        options = dataclasses.replace(options, **_set_options(overrides["options"]))
    fields["options"] = options
    request = Request(**fields)
    other_count = len(request.images) != len(metadata.get("images", ()))
    if other_count or any(name in overrides for name in _CHANGE_THE_IMAGES):
        only = None
    return request, only


def check_format(metadata: Mapping[str, Any]) -> None:
    """Raises UserError for metadata of an older version, which hold less than a request."""
    if metadata.get("format") != FORMAT:
        raise UserError(
            "the file was written by another version of dalle2_jax, whose metadata do not hold all "
            "that is needed to generate it again"
        )


def check_weights(metadata: Mapping[str, Any], model: DALLE2) -> None:
    """Raises UserError unless `model` has the weights that the image was generated with."""
    if metadata.get("hash") != model.weights_hash:
        raise UserError(
            f"the image was generated with the weights {metadata.get('weights')} "
            f"({metadata.get('hash')}), not {model.weights} ({model.weights_hash}): name those"
        )


def _entry(value: InputImage | InputMask) -> dict[str, str]:
    """Returns what the metadata hold of an input."""
    return {"name": value.name, "sha256": value.sha256}


def _reopen(kind: type[Input], entry: Mapping[str, str], folder: Path) -> Input:
    """Opens an input again; raises UserError if it is missing or has changed."""
    name = entry["name"]
    # Relative to the image's folder, which may have been moved with its inputs; then as named.
    for path in (paths.to_path(folder) / name, paths.to_path(name)):
        if path.is_file():
            if sha256_of(path) != entry["sha256"]:
                raise UserError(
                    f"{path} has changed since the image was generated from it: name another file "
                    "for it, or restore it"
                )
            return kind.open(path, name)
    raise UserError(f"the input {name} is missing: name another file for it, or restore it")


def _set_options(options: SamplingOptions) -> dict[str, Any]:
    """Returns the options that are set, by name."""
    return {k: v for k, v in dataclasses.asdict(options).items() if v is not None}


def _plain(value: Any) -> Any:
    """Returns tuples as lists and scalars as Python's, also within {stage: value}."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    value = checks.to_python_values(value)
    return list(value) if isinstance(value, tuple) else value
