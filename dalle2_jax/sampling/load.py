"""A model folder's stages, built from `config.json` and checked against their tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.nets.ar_prior import ARPrior
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.sampling.ar_prior import ARPriorSampler
from dalle2_jax.sampling.ar_prior import Settings as ARSettings
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.stage import Settings, StageSampler
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.storage import model_folder
from dalle2_jax.types import Params
from dalle2_jax.validation import arguments
from dalle2_jax.validation.sections import construct

Sampler = TypeVar("Sampler", bound=StageSampler)

_MISFITS = (AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError)


def clip_network(folder: Path, dtype: str = "float32") -> CLIP:
    """The network of the folder's CLIP. UserError: there is none, or its entry is damaged."""
    entry, where = _entry(folder, "clip", "model")
    return _network(CLIP, entry["model"], where, dtype)


def clip(folder: Path, dtype: str = "float32") -> tuple[CLIP, Params]:
    """The folder's CLIP. UserError: there is none, or it is damaged."""
    return clip_network(folder, dtype), _params(folder, "clip")


def priors(folder: Path, text: CLIP, dtype: str = "float32") -> dict[str, tuple[Any, Params]]:
    """The folder's priors for the CLIP `text`, the diffusion prior first; an image-variations model
    has none. UserError: one is damaged."""
    stages = model_folder.read_config(folder)["stages"]
    known = {"prior": prior, "ar_prior": ar_prior}
    return {name: load(folder, text, dtype) for name, load in known.items() if name in stages}


def prior(folder: Path, text: CLIP, dtype: str = "float32") -> tuple[PriorSampler, Params]:
    """The folder's prior, for the CLIP `text`. UserError: there is none, or it is damaged."""
    _check_clip(folder, "prior")
    options = {"candidates": PriorSampler.candidates}
    sampler = _sampler(PriorSampler, DiffusionPrior, folder, "prior", dtype, **options)
    sampler = dataclasses.replace(sampler, unit_length=text.unit_length)
    return sampler, _params(folder, "prior")


def ar_prior(folder: Path, text: CLIP, dtype: str = "float32") -> tuple[ARPriorSampler, Params]:
    """The folder's autoregressive prior, for the CLIP `text`. UserError: see `prior`."""
    _check_clip(folder, "ar_prior")
    entry, where = _entry(folder, "ar_prior", "model", "sampling")
    options = {"candidates": ARPriorSampler.candidates}
    given = _whole_numbers(entry, options, where)
    parts = {
        "network": _network(ARPrior, entry["model"], where, dtype),
        "settings": _build(ARSettings, entry["sampling"], where),
    }
    sampler = _build(ARPriorSampler, given | {"unit_length": text.unit_length}, where, **parts)
    return sampler, _params(folder, "ar_prior")


def decoder(folder: Path, text: CLIP, dtype: str = "float32") -> tuple[DecoderSampler, Params]:
    """The folder's decoder, for the CLIP `text`. UserError: there is none, or it is damaged."""
    _check_clip(folder, "decoder")
    sampler = _sampler(DecoderSampler, Decoder, folder, "decoder", dtype, image_size=None)
    return sampler, _params(folder, "decoder")


def image_size(folder: Path, asked: int | None = None) -> int | None:
    """The side of the pictures to draw: `asked`, or the folder's default; None: the largest.

    UserError: it is no whole number.
    """
    if asked is not None:
        return arguments.whole("size", asked, 1)
    default = model_folder.read_config(folder).get("image_size")
    name = f"{folder}/config.json: image_size"
    return None if default is None else arguments.whole(name, default, 1)


def upsamplers(
    folder: Path, first: int, dtype: str = "float32", size: int | None = None
) -> dict[str, tuple[UpsamplerSampler, Params]]:
    """The folder's upsamplers from `first` px on, each starting where the one before ends: those
    that pictures of `size` px need, or all.

    UserError: one is damaged, two start at one size, one has no place in the chain, or no stage
    draws pictures of that size.
    """
    entries = model_folder.read_config(folder)["stages"]
    options = {"image_size": None, "separate_last_step": False}
    chain = {
        stage: _sampler(UpsamplerSampler, Upsampler, folder, stage, dtype, **options)
        for stage in upsampler_chain(entries, first)
    }
    count = needed(size, [first, *(sampler.image_size for sampler in chain.values())])
    return {stage: (chain[stage], _params(folder, stage)) for stage in list(chain)[:count]}


def needed(size: int | None, ends: Sequence[int]) -> int:
    """How many upsamplers pictures of `size` px need, where the decoder and each of them in turn
    ends at `ends`: drawn at the next larger one, they are averaged down. None: all.

    UserError: smaller than the decoder's, or larger than the last one's.
    """
    if size is None:
        return len(ends) - 1
    if not ends[0] <= size <= ends[-1]:
        told = f"from {ends[0]} to {ends[-1]} px" if len(ends) > 1 else f"of {ends[0]} px alone"
        raise UserError(f"size={size}: this model draws pictures {told}")
    return sum(end < size for end in ends)


def upsampler_chain(entries: Mapping[str, Mapping[str, Any]], size: int) -> list[str]:
    """The stages that make pictures of `size` px larger, in order; UserError as in `upsamplers`."""
    left = {stage: entry["low_size"] for stage, entry in entries.items() if "low_size" in entry}
    chain = []
    while nexts := sorted(stage for stage, low in left.items() if low == size):
        if len(nexts) > 1:
            raise UserError(
                f"config.json: {' and '.join(nexts)} both start at {size} px: remove one"
            )
        del left[nexts[0]]
        chain += nexts
        size = entries[nexts[0]].get("image_size", 0)
    if left:
        stage, low = min(left.items())
        raise UserError(
            f"config.json: {stage} starts at {low!r} px and no stage ends there: remove it, or "
            "train the stage between"
        )
    return chain


def _entry(folder: Path, stage: str, *keys: str) -> tuple[Mapping[str, Any], str]:
    """The stage's entry, which has all of `keys`, and what errors call it."""
    entry, where = model_folder.read_stage(folder, stage), f"{folder}/config.json: {stage}"
    for key in keys:
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing: export the stage again")
    return entry, where


def _check_clip(folder: Path, stage: str) -> None:
    """UserError where the stage was trained with another CLIP than the folder's."""
    trained_with = model_folder.read_stage(folder, stage).get("clip")
    if trained_with and trained_with != model_folder.stage_hash(folder, "clip"):
        raise UserError(
            f"{folder}: the {stage} was trained with another CLIP ({trained_with}) than the one "
            f"here: train the {stage} again, or copy its clip.safetensors back"
        )


def _sampler(
    cls: type[Sampler],
    network: type[nn.Module],
    folder: Path,
    stage: str,
    dtype: str,
    **options: int | None,
) -> Sampler:
    """`options` are keys of the entry that `cls` takes and what they are by default; None: they
    must be there. Whole numbers from 1 all, or bools where the default is one."""
    required = [name for name, default in options.items() if default is None]
    entry, where = _entry(folder, stage, "model", "diffusion", "sampling", *required)
    given = _whole_numbers(entry, options, where)
    parts: dict[str, Any] = {
        "network": _network(network, entry["model"], where, dtype),
        "process": _build(Process, entry["diffusion"], where),
        "settings": _build(Settings, entry["sampling"], where),
        "x_0_error": _numbers(entry.get("x_0_error", ()), f"{where}: x_0_error"),
    }
    return _build(cls, given, where, **parts)


def _whole_numbers(
    entry: Mapping[str, Any], options: Mapping[str, int | None], where: str
) -> dict[str, Any]:
    """What the entry says of `options`, see `_sampler`."""
    given = {name: entry.get(name, default) for name, default in options.items()}
    for name, value in given.items():
        kind = bool if isinstance(options[name], bool) else int
        if type(value) is not kind or (kind is int and value < 1):
            what = "true or false" if kind is bool else "a whole number from 1"
            raise UserError(f"{where}: {name} is {value!r}, not {what}")
    return given


def _numbers(values: Any, where: str) -> tuple[float, ...]:
    """Of 0 and more."""
    if not isinstance(values, list | tuple) or not all(
        type(v) in (int, float) and 0 <= v < math.inf for v in values
    ):
        raise UserError(f"{where} is {values!r}, not a list of numbers from 0")
    return tuple(map(float, values))


def _network(cls: type[nn.Module], section: Any, where: str, dtype: str) -> Any:
    """The network, computing in `dtype` whatever it was trained in."""
    return _build(cls, section | {"dtype": dtype} if isinstance(section, dict) else section, where)


def _build(cls: type, section: Any, where: str, **given: Any) -> Any:
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: {section!r} stands where a section should")
    try:
        return construct(cls, section, where, **given)
    except (UserError, *_MISFITS) as error:
        told = _told(error)
        raise UserError(told if told.startswith(where) else f"{where}: {told}") from error


def network_of(stage: str) -> type[nn.Module]:
    """The class of a stage's network."""
    named: dict[str, type[nn.Module]] = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder}
    named["ar_prior"] = ARPrior
    return named.get(stage, Upsampler)


def expected_params(entries: Mapping[str, Any], stage: str, where: str) -> Params:
    """Shapes of the parameters that the stage's network has, by the entries of a `config.json` (at
    `where`). UserError: no network can be built so."""
    try:
        entry = entries[stage]
        network = _network(network_of(stage), entry["model"], where, "float32")
        inputs: tuple[Any, ...] = ()
        if stage in ("prior", "ar_prior", "decoder"):
            inputs = (entries["clip"]["model"]["text"]["width"],)
        if "image_size" in entry:
            inputs += (entry["image_size"],)
        init = functools.partial(network.init, jax.random.key(0))
        params = jax.eval_shape(lambda: init(*network.init_inputs(*inputs)))["params"]
    except UserError:
        raise
    except _MISFITS as error:
        raise UserError(f"{where}: no network can be built so ({_told(error)})") from error
    parts = ("first", "last") if entry.get("separate_last_step") else ()
    return dict.fromkeys(parts, params) if parts else params


def _params(folder: Path, stage: str) -> Params:
    """The stage's tensors, by name and shape those that its network has."""
    params = model_folder.read_params(folder, stage)
    entries = model_folder.read_config(folder)["stages"]
    expected = expected_params(entries, stage, f"{folder}/config.json: {stage}")
    model_folder.check_params(params, expected, str(model_folder.stage_path(folder, stage)))
    return params


def _told(error: Exception) -> str:
    told = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    return told.strip().splitlines()[0]
