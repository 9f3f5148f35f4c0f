"""The trained CLIP that prior and decoder learn from, loaded once and never updated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.data.config import DataConfig
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.transformer import ACTIVATIONS
from dalle2_jax.sampling import load
from dalle2_jax.storage import config_file, model_folder, model_names
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params
from dalle2_jax.validation.checks import one_of
from dalle2_jax.validation.sections import construct


def check_captions(config: Any, text: Mapping[str, Any], whose: str) -> None:
    """Raises UserError if the tokens of `config.data` are not those that `text` reads."""
    names = ("context_length", "vocab_size")
    try:
        # What the config leaves out, the tokenizer's defaults decide, as they will in the pipeline.
        tokenizer = Tokenizer(**{name: config.data[name] for name in names if name in config.data})
    except ValueError as error:
        raise UserError(f"config.data: {error}") from error
    values = {name: getattr(tokenizer, name) for name in names}
    _check_equal("config.data", values, {name: text.get(name) for name in names}, whose)


def check_images(config: Any, least: int, whose: str) -> None:
    """Raises UserError if the images of `config.data` have less than `least` pixels a side."""
    size = config.data.get("image_size", DataConfig.image_size)
    if size < least:
        raise UserError(
            f"config.data.image_size={size} but {whose} asks for {least}: "
            f"set --config.data.image_size={least}"
        )


def _check_equal(
    where: str, values: Mapping[str, Any], expected: Mapping[str, Any], whose: str
) -> None:
    for name, value in expected.items():
        if values.get(name) != value:
            raise UserError(
                f"{where}.{name}={values.get(name)} but {whose} has {value}: "
                f"set --{where}.{name}={value}"
            )


def check_transformer(where: str, section: Mapping[str, Any], activation: str) -> None:
    """Raises UserError for heads that do not divide the width and for an unknown activation."""
    width, heads = section.get("width", 1), section.get("heads", 1)
    if heads < 1 or width % heads:
        raise UserError(f"{where}.heads={heads} must divide {where}.width={width}")
    one_of("config.model.activation", activation, ACTIVATIONS)


def _network_of(path: str) -> CLIP:
    """Returns the CLIP of a config file, FILE or FILE:VARIANT."""
    try:
        config = config_file.load(path)
    except UserError as error:
        raise UserError(f"config.clip_from={path}: {error}") from error
    return construct(CLIP, config.model, path)


@dataclasses.dataclass(frozen=True)
class FrozenCLIP:
    """The CLIP of `config.clip_from`: its network, and where its parameters are."""

    network: CLIP
    image_size: int
    folder: str
    hash: str  # names its tensors in the entries of the stages that learn from it

    @classmethod
    def load(cls, config: Any, reads_captions: bool = True) -> FrozenCLIP:
        """Loads the CLIP of `config.clip_from`, whose width `config.model.dim` must equal.

        A config file (configs/clip.py:paper) in place of a folder gives only shapes, which suffice
        to compile for a slice but not to train. With `reads_captions`, `config.data` and
        `config.model.context_length` must fit its text tower.
        """
        if not config.clip_from:
            raise UserError(
                "config.clip_from is empty: name the model folder of a trained CLIP, "
                "as in --config.clip_from=runs/tiny/model"
            )
        # No weights, hence the hash "": `params` then returns shapes alone.
        if re.search(r"\.py(:\w+)?$", config.clip_from):
            network, folder, weights = _network_of(config.clip_from), config.clip_from, ""
        else:
            folder = model_names.resolve(config.clip_from)
            network, weights = load.network(folder, "clip"), model_folder.stage_hash(folder, "clip")
        text, whose = network.text, f"the CLIP of {folder}"
        if network.image is None:
            raise UserError(
                f"config.clip_from={config.clip_from} has no image tower, which tells z_img of the "
                "images to learn from: name a model that has one (Karlo's image variations)"
            )
        _check_equal("config.model", config.model, {"dim": network.dim}, whose)
        check_images(config, network.image["image_size"], whose)
        if reads_captions:
            check_captions(config, text, whose)
            length = {"context_length": text["context_length"]}
            _check_equal("config.model", config.model, length, whose)
        return cls(
            network=network,
            image_size=network.image["image_size"],
            folder=str(folder),
            hash=weights,
        )

    def params(self) -> Params:
        """Returns the parameters; only shapes if there are no weights, see `load`."""
        if not self.hash:
            # Enough for ahead-of-time compilation, which allocates nothing.
            inputs = self.network.init_inputs
            return jax.eval_shape(lambda: self.network.init(jax.random.key(0), *inputs()))["params"]
        return load.params(Path(self.folder), "clip")

    def encode_image(self, params: Params, images: Array) -> Array:
        """Images [b, s, s, 3] in [-1, 1] of any size -> z_img [b, dim]."""
        # The filter that this CLIP was trained with. Bicubic overshoots, hence the clip.
        method = self.network.image.get("resize", "area")
        images = jnp.clip(arrays.resize(images, self.image_size, method), -1, 1)
        return forward(self.network, params, images, method="encode_image")

    def encode_text(self, params: Params, tokens: Array, keep: Array | None = None) -> TextEncoding:
        """Encodes tokens [b, n]; where `keep` [b] is False, the empty caption in their place.

        The latter is "no caption" for a network that learned no null (`nets.conditioning`).
        """
        if keep is not None:
            text = self.network.text
            empty = Tokenizer(text["context_length"], text["vocab_size"])([""])
            tokens = jnp.where(keep[:, None], tokens, empty)
        return forward(self.network, params, tokens, method="encode_text")
