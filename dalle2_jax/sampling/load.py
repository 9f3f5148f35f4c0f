"""Stages of a model folder, built from `config.json` and checked against their tensors.

One function loads any stage that the table of stages has. What differs between stages is said by
their classes: a network's `reads_text` (its shapes depend on CLIP's text width), and a sampler's
`ENTRY_OPTIONS` (keys of the stage's entry that its constructor takes) and `needs_clip` (it was
trained with one CLIP and works with no other).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from dalle2_jax import stages
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.storage import model_folder
from dalle2_jax.types import Params
from dalle2_jax.validation import checks
from dalle2_jax.validation.sections import construct

# What flax and jax raise for sizes that do not fit together.
_MISFITS = (AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError)


def network(folder: Path, stage: str, dtype: str = "float32") -> Any:
    """Returns the stage's Flax module.

    Raises UserError if the folder has no such stage, or its entry is damaged.
    """
    entry, where = _entry(folder, stage, "model")
    return _network(network_class(stage), entry["model"], where, dtype)


def params(folder: Path, stage: str) -> Params:
    """Returns the stage's tensors; raises UserError unless they are those that its network has."""
    tensors = model_folder.read_params(folder, stage)
    entries = model_folder.read_config(folder)["stages"]
    expected = expected_params(entries, stage, f"{folder}/config.json: {stage}")
    model_folder.check_params(tensors, expected, str(model_folder.stage_path(folder, stage)))
    return tensors


def sampler(folder: Path, stage: str, clip: Any = None, dtype: str = "float32") -> Any:
    """Returns the stage's sampler.

    Args:
        clip: the folder's CLIP network, for stages that need one.

    Raises:
        UserError: the folder has no such stage, its entry is damaged, or it was trained with
            another CLIP than the folder's.
    """
    # Imports the sampler's module only now: a stage that is not loaded costs nothing.
    cls = stages.resolve(str(stages.find(stage).sampler))
    options = dict(cls.ENTRY_OPTIONS)
    required = [name for name, default in options.items() if default is None]
    fields = {field.name for field in dataclasses.fields(cls)}
    # The autoregressive prior has no noise process and no errors to measure.
    diffuses = "process" in fields
    keys = ("model", "diffusion", "sampling") if diffuses else ("model", "sampling")
    if cls.needs_clip:
        _check_clip(folder, stage)
    entry, where = _entry(folder, stage, *keys, *required)
    section = _options_of(entry, options, where)
    if "unit_length" in fields:
        # A property of CLIP, kept in CLIP's entry only, so that the two cannot disagree.
        section["unit_length"] = clip.unit_length
    parts = {
        "network": _network(network_class(stage), entry["model"], where, dtype),
        "settings": _build(cls.SETTINGS, entry["sampling"], where),
    }
    if diffuses:
        parts["process"] = _build(Process, entry["diffusion"], where)
        parts["x_0_error"] = _errors(entry.get("x_0_error", ()), f"{where}: x_0_error")
    return _build(cls, section, where, **parts)


def image_size(folder: Path, size: int | None = None) -> int | None:
    """Returns the side of the images to generate: `size`, or the folder's default.

    None stands for the size of the last stage. Raises UserError for anything but whole numbers.
    """
    if size is not None:
        return checks.whole_number("size", size, 1)
    default = model_folder.read_config(folder).get("image_size")
    name = f"{folder}/config.json: image_size"
    return None if default is None else checks.whole_number(name, default, 1)


def num_upsamplers(size: int | None, sizes: Sequence[int]) -> int:
    """Returns how many upsamplers images of `size` px need; None: all.

    Images are generated at the next larger size of a stage and averaged down.

    Args:
        sizes: the sides of the decoder's images and of each upsampler's, in order.

    Raises:
        UserError: `size` is below the first or above the last of `sizes`.
    """
    if size is None:
        return len(sizes) - 1
    if not sizes[0] <= size <= sizes[-1]:
        possible = f"from {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"of {sizes[0]}"
        raise UserError(f"size={size}: this model generates images {possible} px")
    # `sizes` rise, so the stages below `size`, counting the decoder, are as many as the upsamplers
    # up to the first that reaches it.
    return sum(stage_size < size for stage_size in sizes)


def upsampler_chain(entries: Mapping[str, Mapping[str, Any]], size: int) -> list[str]:
    """Returns the stages that enlarge images of `size` px, each starting where one ends.

    Args:
        entries: the entries of a `config.json`.

    Raises:
        UserError: two stages start at one size, or one has no place in the chain.
    """
    remaining = {
        stage: entry["low_size"] for stage, entry in entries.items() if "low_size" in entry
    }
    chain = []
    # Each turn removes a stage, so it ends even if a damaged folder has a cycle.
    while successors := sorted(stage for stage, low in remaining.items() if low == size):
        if len(successors) > 1:
            raise UserError(
                f"config.json: {' and '.join(successors)} both start at {size} px: remove one"
            )
        del remaining[successors[0]]
        chain += successors
        # Without image_size the chain ends: no stage starts at 0 px.
        size = entries[successors[0]].get("image_size", 0)
    if remaining:
        stage, low = min(remaining.items())
        raise UserError(
            f"config.json: {stage} starts at {low!r} px and no stage ends there: remove it, or "
            "train the stage between"
        )
    return chain


def network_class(stage: str) -> type[nn.Module]:
    """Returns the class of a stage's network; raises UserError for an unknown stage."""
    return stages.resolve(stages.find(stage).network)


def expected_params(entries: Mapping[str, Any], stage: str, where: str) -> Params:
    """Returns the shapes of the parameters of a stage's network.

    Args:
        entries: the entries of a `config.json`.
        where: what error messages call that file.

    Raises:
        UserError: no network can be built from the entries.
    """
    cls = network_class(stage)
    try:
        # float32 whatever the tensors are: shapes alone are compared.
        entry = entries[stage]
        module = _network(cls, entry["model"], where, "float32")
        inputs: tuple[Any, ...] = ()
        if getattr(cls, "reads_text", False):
            # Layers take their shapes from their inputs, and txt_enc is as wide as the text tower.
            inputs = (entries["clip"]["model"]["text"]["width"],)
        if "image_size" in entry:
            inputs += (entry["image_size"],)
        shapes = _trace_init(module, inputs)
    except UserError:
        raise
    except _MISFITS as error:
        raise UserError(f"{where}: no network can be built so ({_message(error)})") from error
    parts = ("first", "last") if entry.get("separate_last_step") else ()
    shapes = jax.tree.map(lambda leaf: leaf, shapes)  # a copy, because the trace is shared
    return dict.fromkeys(parts, shapes) if parts else shapes


# Tracing a network of Karlo's depth takes a second, and loading and exporting ask several times.
@functools.lru_cache(maxsize=16)
def _trace_init(module: nn.Module, inputs: tuple[Any, ...]) -> Params:
    """Returns the shapes of the parameters that `module.init` makes from `init_inputs(*inputs)`."""
    init = functools.partial(module.init, jax.random.key(0))
    # The inputs are made inside, so neither they nor the parameters take memory.
    return jax.eval_shape(lambda: init(*module.init_inputs(*inputs)))["params"]


def _entry(folder: Path, stage: str, *keys: str) -> tuple[Mapping[str, Any], str]:
    """Returns the stage's entry, which must have all of `keys`, and its name in messages."""
    entry, where = model_folder.read_stage(folder, stage), f"{folder}/config.json: {stage}"
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing: export the stage again")
    return entry, where


def _check_clip(folder: Path, stage: str) -> None:
    """Raises UserError if the stage was trained with another CLIP than the folder's."""
    trained_with = model_folder.read_stage(folder, stage).get("clip")
    if trained_with and trained_with != model_folder.stage_hash(folder, "clip"):
        raise UserError(
            f"{folder}: the {stage} was trained with another CLIP ({trained_with}) than the one "
            f"here: train the {stage} again, or copy its clip.safetensors back"
        )


def _options_of(
    entry: Mapping[str, Any], options: Mapping[str, int | None], where: str
) -> dict[str, Any]:
    """Returns the entry's values of `options` (name -> default): whole numbers from 1, or bools."""
    values = {name: entry.get(name, default) for name, default in options.items()}
    for name, value in values.items():
        # bool first: it is a kind of int, and True would pass for 1.
        if isinstance(options[name], bool):
            checks.require(isinstance(value, bool), f"{where}: {name}", "true or false", value)
        else:
            checks.whole_number(f"{where}: {name}", value, 1)
    return values


def _errors(values: Any, where: str) -> tuple[float, ...]:
    """Returns a list of finite numbers from 0 as floats; raises UserError for anything else."""
    are_valid = isinstance(values, list | tuple) and all(checks.is_number(v, 0) for v in values)
    checks.require(are_valid, where, "a list of numbers from 0", values)
    return tuple(map(float, values))


def _network(cls: type[nn.Module], section: Any, where: str, dtype: str) -> Any:
    """Returns the network, computing in `dtype` whatever it was trained in."""
    return _build(cls, {**section, "dtype": dtype} if isinstance(section, dict) else section, where)


def _build(cls: type, section: Any, where: str, **kwargs: Any) -> Any:
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: {section!r} stands where a section should")
    try:
        return construct(cls, section, where, **kwargs)
    except (UserError, *_MISFITS) as error:
        message = _message(error)
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from error


def _message(error: Exception) -> str:
    message = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    return (message.strip() or type(error).__name__).splitlines()[0]
