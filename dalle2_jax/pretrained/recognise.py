"""Whose model a folder or file is."""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import unclip
from dalle2_jax.pretrained.sources import Stage, read_json


def stages(source: Path) -> list[Stage]:
    """What the model consists of, CLIP first.

    Raises UserError where nothing here reads it, or its settings are of a network that is not ours.
    """
    index = source / "model_index.json"
    if not index.is_file():
        raise UserError(f"{source} is no model that is read here: {index.name} is missing")
    kind = read_json(index).get("_class_name")
    if kind in unclip.PIPELINES:
        return list(unclip.stages(source))
    raise UserError(f"{index}: {kind} is not read here, but {' and '.join(unclip.PIPELINES)}")
