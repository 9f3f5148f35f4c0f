"""Whose model a folder or file is."""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import kandinsky, karlo, unclip
from dalle2_jax.pretrained.sources import Stage, read_json

PIPELINES = {name: reader for reader in (unclip, kandinsky) for name in reader.PIPELINES}


def stages(source: Path) -> list[Stage]:
    """What the model consists of, CLIP first.

    Raises UserError where nothing here reads it, or its settings are of a network that is not ours.
    """
    index = source / "model_index.json"
    if index.is_file():
        kind = read_json(index).get("_class_name")
        if kind in PIPELINES:
            return list(PIPELINES[kind].stages(source))
        raise UserError(f"{index}: {kind} is not read here, but {', '.join(PIPELINES)}")
    if karlo.is_here(source):
        return list(karlo.stages(source))
    raise UserError(
        f"{source} is no model that is read here: neither {index.name} nor {karlo.PRIOR} is there"
    )
