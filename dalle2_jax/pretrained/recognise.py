"""Whose model a folder or file is, and under what licence."""

from __future__ import annotations

import re
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import clip, kandinsky, karlo_diffusers, karlo_original
from dalle2_jax.pretrained.sources import Stage, read_json
from dalle2_jax.storage import licence, model_folder

PIPELINES = {name: reader for reader in (karlo_diffusers, kandinsky) for name in reader.PIPELINES}


def is_foreign(folder: Path) -> bool:
    """Returns whether a folder holds another program's model, even one that nothing here reads."""
    pipeline = (folder / "model_index.json").is_file()
    return pipeline or karlo_original.is_here(folder) or clip.is_here(folder)


def stages(source: Path) -> list[Stage]:
    """Yields the stages of the model, CLIP first.

    Raises UserError if nothing here reads it, or if its settings are of a network that is not ours.
    """
    index = source / "model_index.json"
    if index.is_file():
        kind = read_json(index).get("_class_name")
        if str(kind) in PIPELINES:
            return list(PIPELINES[str(kind)].stages(source))
        raise UserError(f"{index}: {kind} is not read here, but {', '.join(PIPELINES)}")
    if karlo_original.is_here(source):
        return list(karlo_original.stages(source))
    if clip.is_here(source):
        return list(clip.stages(source))
    if (source / model_folder.CONFIG_NAME).is_file():
        model_folder.read_config(source)
        raise UserError(f"{source} is a model folder already: there is nothing to import")
    reason = "a pickle or a file of another program"
    if source.is_dir():
        reason = (
            f"none of {index.name}, {karlo_original.PRIOR}, {clip.OPEN_CLIP}, "
            "CLIP's config.json is there"
        )
    raise UserError(f"{source} is no model that is read here: {reason}")


def licence_of(source: Path) -> str:
    """Returns the text of the licence of the source's weights; nothing if none is named.

    A file goes before the model card, and this before the name of who published the model. Beside a
    source that is one file lies what may be of another.
    """
    if source.is_file():
        return ""
    folder = source
    files = [path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file()]
    if files:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    named = re.search(r"^license: *[\"']?([^\s\"']+)", header[1], re.MULTILINE) if header else None
    index = folder / "model_index.json"
    origin = str(read_json(index).get("_name_or_path") or "") if index.is_file() else ""
    by_name = "kakaobrain/karlo" in origin or "kakaobrain--karlo" in str(folder)  # the hub's cache
    openrail = (
        named[1] == "creativeml-openrail-m" if named else by_name or karlo_original.is_here(folder)
    )
    if openrail:
        return licence.OPENRAIL_M.read_text(encoding="utf-8")
    return f"{named[1]}, as the model card of {origin or folder.name} says\n" if named else ""
