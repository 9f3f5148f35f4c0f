"""CLIP: an image tower and a text tower that share an embedding space (2103.00020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.nets.layers import LayerNorm
from dalle2_jax.nets.transformer import Transformer, causal_mask
from dalle2_jax.types import Array

MAX_LOGIT_SCALE = math.log(100.0)  # section 2.5: the temperature is clipped at 100


def normalise(z: Array) -> Array:
    """Scales z [..., d] to unit length, in float32."""
    z = z.astype(jnp.float32)
    return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-8)


class TextEncoding(NamedTuple):
    """CLIP's encoding of b captions."""

    z_txt: Array  # b d, of unit length where the CLIP says so
    txt_enc: Array  # b n width, hidden states after the last norm
    txt_mask: Array  # b n, True up to and with the end-of-text token


def text_mask(tokens: Array, eot_id: int) -> Array:
    """Returns bool [b, n], True up to and including the first end-of-text token."""
    # End tokens up to here, minus this one: a place is shown if no end token stands before it.
    seen = jnp.cumsum((tokens == eot_id).astype(jnp.int32), axis=1)
    return (seen - (tokens == eot_id)) == 0


class TextTower(nn.Module):
    """tokens [b, n] -> (projection of the end token [b, dim], states [b, n, width], mask)."""

    dim: int
    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"
    mlp_ratio: float = 4.0

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array, Array]:
        n = tokens.shape[1]
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="token",
        )
        shape = (self.context_length, self.width)
        positions = self.param("positions", nn.initializers.normal(0.01), shape, jnp.float32)
        x = embed(tokens) + positions[None, :n].astype(self.dtype)
        x = Transformer(
            self.depth,
            self.heads,
            self.activation,
            self.dtype,
            self.remat,
            self.mlp_ratio,
            name="transformer",
        )(x, causal_mask(n))
        x = LayerNorm(name="norm")(x)
        mask = text_mask(tokens, self.vocab_size - 1)
        # The mask ends with the end token, the only one that has read the whole caption: the tower
        # is causal.
        last = jnp.sum(mask, axis=1) - 1
        end = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]  # b width
        z = nn.Dense(self.dim, use_bias=False, dtype=self.dtype, name="projection")(end)
        return z, x, mask


class ImageTower(nn.Module):
    """images [b, s, s, 3] in [-1, 1] -> projection of the class token [b, dim] (ViT).

    `mean` and `std`, of channels from 0 to 1, standardise the input; `resize` ("area" or "bicubic")
    is the filter that its images are resized with.
    """

    dim: int
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"
    mlp_ratio: float = 4.0
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    resize: str = "area"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        b, p = images.shape[0], self.patch_size
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"CLIP sees {self.image_size} px, not {images.shape[1:3]}: resize")
        patches = nn.Conv(
            self.width, (p, p), (p, p), "VALID", use_bias=False, dtype=self.dtype, name="patch"
        )
        # From statistics of channels in [0, 1] to those in [-1, 1]; the defaults become 0 and 1.
        mean = jnp.array([2 * m - 1 for m in self.mean], jnp.float32)[None, None, None]
        std = jnp.array([2 * s for s in self.std], jnp.float32)[None, None, None]
        images = (images.astype(jnp.float32) - mean) / std
        x = patches(images.astype(self.dtype)).reshape(b, -1, self.width)  # b h w d -> b n d
        init = nn.initializers.normal(self.width**-0.5)
        cls = self.param("cls", init, (1, 1, self.width), jnp.float32).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, self.width)), x], axis=1)
        positions = self.param("positions", init, x.shape[1:], jnp.float32)
        x = LayerNorm(name="norm_in")(x + positions[None].astype(self.dtype))
        x = Transformer(
            self.depth,
            self.heads,
            self.activation,
            self.dtype,
            self.remat,
            self.mlp_ratio,
            name="transformer",
        )(x)
        x = LayerNorm(name="norm")(x[:, 0])
        return nn.Dense(self.dim, use_bias=False, dtype=self.dtype, name="projection")(x)


class CLIP(nn.Module):
    """Both towers and the temperature.

    Attributes:
        dim: width of the shared embedding space.
        image, text: arguments of the towers (`ImageTower`, `TextTower`) without `dim` and
            `activation`, which they share. Models that only generate may lack one tower (None).
        activation: see `transformer.ACTIVATIONS`.
        dtype: what the towers compute in.
        unit_length: encodings are scaled to unit length; otherwise they stay as the towers give
            them.
        learned_temperature: whether there is one to train.
    """

    dim: int
    image: Any  # a mapping; or None, which training never meets
    text: Any
    activation: str = "gelu"
    dtype: Any = jnp.float32
    unit_length: bool = True
    learned_temperature: bool = True
    SECTIONS: ClassVar = {"image": ImageTower, "text": TextTower}

    def setup(self) -> None:
        shared = {"dim": self.dim, "activation": self.activation, "dtype": self.dtype}
        if self.image is not None:
            self.image_tower = ImageTower(**shared, **self.image)
        if self.text is not None:
            self.text_tower = TextTower(**shared, **self.text)
        if self.learned_temperature:
            init = nn.initializers.constant(math.log(1 / 0.07))  # section 2.5
            self.log_scale = self.param("logit_scale", init, (), jnp.float32)

    def init_inputs(self) -> tuple[Array | None, ...]:
        """Returns zeros to call `init` with; None for a tower that is missing."""
        images = tokens = None
        if self.image is not None:
            size = self.image["image_size"]
            images = jnp.zeros((1, size, size, 3))
        if self.text is not None:
            tokens = jnp.zeros((1, self.text["context_length"]), jnp.int32)
        return images, tokens

    def encode_image(self, images: Array) -> Array:
        """images [b, s, s, 3] in [-1, 1] -> z_img float32 [b, dim]."""
        return self._length(self.image_tower(images))

    def encode_text(self, tokens: Array) -> TextEncoding:
        """tokens [b, n] -> their encoding."""
        z, txt_enc, txt_mask = self.text_tower(tokens)
        return TextEncoding(self._length(z), txt_enc, txt_mask)

    def _length(self, z: Array) -> Array:
        return normalise(z) if self.unit_length else z.astype(jnp.float32)

    def logit_scale(self) -> Array:
        """Returns the temperature, a float32 scalar that multiplies dot products; at most 100."""
        if not self.learned_temperature:
            return jnp.float32(math.exp(MAX_LOGIT_SCALE))
        clipped = jnp.minimum(self.log_scale, MAX_LOGIT_SCALE)
        # Straight through: once past the limit it could not come down again without a gradient.
        return jnp.exp(self.log_scale + jax.lax.stop_gradient(clipped - self.log_scale))

    def __call__(self, images: Array | None, tokens: Array | None) -> tuple[Any, Any, Array]:
        """Returns (z_img, z_txt, both of unit length, the scale of their dot products)."""
        z_img = None if images is None else normalise(self.image_tower(images))
        z_txt = None if tokens is None else normalise(self.text_tower(tokens)[0])
        return z_img, z_txt, self.logit_scale()
