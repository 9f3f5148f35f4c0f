"""The trained CLIP that the prior and the decoder learn from, loaded once and never updated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax import images, model_folder
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling import load
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params


def check_captions(config: Any, text: Mapping[str, Any], whose: str) -> None:
    """Raises UserError if the tokens of `config.data` are not those that `text` reads."""
    names = ("context_length", "vocab_size")
    tokenizer = Tokenizer(**{name: config.data[name] for name in names if name in config.data})
    for name in names:
        if getattr(tokenizer, name) != text[name]:
            raise UserError(
                f"config.data.{name}={getattr(tokenizer, name)} but {whose} has "
                f"{text[name]}: set --config.data.{name}={text[name]}"
            )


@dataclasses.dataclass(frozen=True)
class FrozenCLIP:
    network: CLIP
    image_size: int
    context_length: int
    vocab_size: int
    folder: str

    @classmethod
    def load(cls, config: Any, reads_captions: bool = True) -> FrozenCLIP:
        """From `config.clip_from`; where it `reads_captions`, `config.data` must suit it."""
        if not config.clip_from:
            raise UserError(
                "config.clip_from is empty: name the model folder of a trained CLIP, "
                "as in --config.clip_from=runs/tiny"
            )
        folder = model_folder.resolve(config.clip_from)
        network = load.clip_network(folder)
        text = network.text
        if reads_captions:
            check_captions(config, text, f"the CLIP of {folder}")
        size = network.image["image_size"]
        return cls(network, size, text["context_length"], text["vocab_size"], str(folder))

    def params(self) -> Params:
        return model_folder.read_params(self.folder, "clip")

    def encode_image(self, params: Params, pictures: Array) -> Array:
        """pictures [b, s, s, 3] in [-1, 1] of any size -> z_img [b, dim], unit length."""
        pictures = images.resize(pictures, self.image_size, "area")
        return forward(self.network, params, pictures, method="encode_image")

    def encode_text(self, params: Params, tokens: Array) -> TextEncoding:
        return forward(self.network, params, tokens, method="encode_text")
