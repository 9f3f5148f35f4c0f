"""The trained CLIP that the prior and the decoder learn from, loaded once and never updated."""

from __future__ import annotations

import dataclasses
from typing import Any

from dalle2_jax import images, model_folder
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.options import construct
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class FrozenCLIP:
    network: CLIP
    image_size: int
    context_length: int
    vocab_size: int
    folder: str

    @classmethod
    def load(cls, config: Any) -> FrozenCLIP:
        """From `config.clip_from`; its vocabulary must be that of `config.data`."""
        if not config.clip_from:
            raise UserError(
                "config.clip_from is empty: name the model folder of a trained CLIP, "
                "as in --config.clip_from=runs/tiny"
            )
        folder = model_folder.resolve(config.clip_from)
        entry = model_folder.read_stage(folder, "clip")
        network = construct(CLIP, entry["model"], f"{folder}/config.json: clip")
        text = network.text
        for name in ("context_length", "vocab_size"):
            if config.data[name] != text[name]:
                raise UserError(
                    f"config.data.{name}={config.data[name]} but the CLIP of {folder} has "
                    f"{text[name]}: set --config.data.{name}={text[name]}"
                )
        size = network.image["image_size"]
        return cls(network, size, text["context_length"], text["vocab_size"], str(folder))

    def params(self) -> Params:
        return model_folder.read_params(self.folder, "clip")

    def encode_image(self, params: Params, pictures: Array) -> Array:
        """pictures [b, s, s, 3] in [-1, 1] of any size -> z_img [b, dim], unit length."""
        pictures = images.resize(pictures, self.image_size, "area")
        return self.network.apply({"params": params}, pictures, method="encode_image")

    def encode_text(self, params: Params, tokens: Array) -> TextEncoding:
        return self.network.apply({"params": params}, tokens, method="encode_text")
