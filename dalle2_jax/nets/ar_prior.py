"""The autoregressive prior: a causal transformer over the codes of z_img (unCLIP section 2.2)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.nets.clip import normalise
from dalle2_jax.nets.layers import LayerNorm
from dalle2_jax.nets.transformer import Cache, Transformer, causal_mask
from dalle2_jax.types import Array

EXACT = jax.lax.Precision.HIGHEST  # otherwise a TPU multiplies in bfloat16


class Statistics(nn.Module):
    """Conversion of z_img to codes and back: PCA, then buckets of equal width over each range.

    Nothing here is trained: `tasks.ar_prior` fits it once to the embeddings of training images. A
    fresh one keeps the first `dims` coordinates. Code 0 is that of the dot product of z_img and
    z_txt, code i that of the i-th principal direction, by falling variance.
    """

    dim: int
    dims: int
    buckets: int

    def setup(self) -> None:
        zeros, f32 = nn.initializers.zeros, jnp.float32
        self.mean = self.param("mean", zeros, (self.dim,), f32)
        self.components = self.param("components", lambda _: jnp.eye(self.dims, self.dim))
        self.low = self.param("low", nn.initializers.constant(-1.0), (1 + self.dims,), f32)
        self.high = self.param("high", nn.initializers.ones, (1 + self.dims,), f32)

    def values(self, z_img: Array, z_txt: Array) -> Array:
        """z_img, z_txt [b, dim] -> the values that are quantised, float32 [b, 1 + dims]."""
        # Back to float32, since sampling may keep matrices in bfloat16 (`pipelines.placement`).
        components = self.components.astype(jnp.float32)
        dot = jnp.sum(normalise(z_img) * normalise(z_txt), axis=1, keepdims=True)  # a cosine
        along = jnp.einsum("bd,kd->bk", z_img - self.mean[None], components, precision=EXACT)
        return jnp.concatenate([dot, along], axis=1)

    def codes(self, z_img: Array, z_txt: Array) -> Array:
        """z_img, z_txt [b, dim] -> codes int32 [b, 1 + dims]."""
        # The bound prevents a division by 0 along a direction in which all training images agree.
        width = jnp.maximum(self.high - self.low, 1e-6)[None]
        share = (self.values(z_img, z_txt) - self.low[None]) / width
        codes = jnp.floor(share * self.buckets).astype(jnp.int32)
        # Values beyond the range of the fitted data fall into the outer buckets.
        return jnp.clip(codes, 0, self.buckets - 1)

    def z_img(self, codes: Array) -> Array:
        """Codes int32 [b, 1 + dims] -> z_img float32 [b, dim], from the middles of the buckets."""
        # Code 0, the dot product, is left out: the directions alone make z_img.
        share = (codes[:, 1:].astype(jnp.float32) + 0.5) / self.buckets
        along = self.low[None, 1:] + share * (self.high - self.low)[None, 1:]
        components = self.components.astype(jnp.float32)
        return self.mean[None] + jnp.einsum("bk,kd->bd", along, components, precision=EXACT)


class Past(NamedTuple):
    """Keys and values of the codes so far, which decoding keeps instead of computing them again."""

    cache: Cache
    keys: Array  # bool b n: places that hold something, or will


class ARPrior(nn.Module):
    """The sequence [txt_enc, z_txt, dot, codes]; the output at each place predicts the next code.

    "dot" is the quantised dot product of z_img and z_txt. Everything is causal: a code is predicted
    from the caption, z_txt and the codes before it. Padding is masked. A caption whose `txt_mask`
    is empty is "no caption": a learned vector stands for its z_txt. All codes share one table of
    embeddings and one output layer; each place has an embedding and an output bias of its own.

    Attributes:
        dim: width of z_img.
        context_length: tokens of a caption.
        width, depth, heads: of the transformer.
        dims: principal directions of z_img that are coded.
        buckets: values of a code.
        activation, dtype, remat: see `DiffusionPrior`.
    """

    reads_text: ClassVar[bool] = True  # its shapes depend on the width of CLIP's text tower

    dim: int
    context_length: int
    width: int
    depth: int
    heads: int
    dims: int
    buckets: int = 1024
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"

    def init_inputs(self, text_width: int) -> tuple[Array, ...]:
        """Returns zeros to call `init` with, for a CLIP whose text tower has `text_width`."""
        z, n = jnp.zeros((1, self.dim)), self.context_length
        return z, z, jnp.zeros((1, n, text_width)), jnp.ones((1, n), bool)

    def setup(self) -> None:
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        self.txt_enc = nn.Dense(self.width, dtype=self.dtype)
        self.z_txt = nn.Dense(self.width, dtype=self.dtype)
        self.null_z_txt = self.param("null_z_txt", zeros, (self.dim,), jnp.float32)
        self.code = nn.Embed(
            self.buckets, self.width, embedding_init=normal(0.02), dtype=self.dtype
        )
        # [caption | z_txt | codes 0 .. dims - 1]. The last code, dims, is predicted but never read.
        shape = (self.context_length + 1 + self.dims, self.width)
        self.positions = self.param("positions", normal(0.01), shape, jnp.float32)
        self.transformer = Transformer(
            self.depth, self.heads, self.activation, self.dtype, self.remat
        )
        self.norm = LayerNorm()
        self.out = nn.Dense(self.buckets, use_bias=False, dtype=jnp.float32)  # for the loss
        self.bias = self.param("bias", zeros, (1 + self.dims, self.buckets), jnp.float32)
        self.statistics = Statistics(self.dim, self.dims, self.buckets)

    def __call__(
        self, z_img: Array, z_txt: Array, txt_enc: Array, txt_mask: Array
    ) -> tuple[Array, Array]:
        """Returns (logits float32 [b, 1 + dims, buckets], codes of z_img int32 [b, 1 + dims]).

        Args: z_img, z_txt [b, dim], txt_enc [b, n, w], txt_mask bool [b, n].
        """
        codes = self.codes(z_img, z_txt)
        return self.logits(codes, z_txt, txt_enc, txt_mask), codes

    def codes(self, z_img: Array, z_txt: Array) -> Array:
        """Returns the codes of z_img, see `Statistics.codes`."""
        return self.statistics.codes(z_img, z_txt)

    def to_z_img(self, codes: Array) -> Array:
        """Returns the z_img of codes, see `Statistics.z_img`."""
        return self.statistics.z_img(codes)

    def logits(self, codes: Array, z_txt: Array, txt_enc: Array, txt_mask: Array) -> Array:
        """Returns logits [b, 1 + dims, buckets]: each code's, given the `codes` before it."""
        # Teacher forcing: all codes are known, and the causal mask hides what is to be predicted.
        before = self._embed(codes[:, :-1], jnp.arange(self.dims))
        x = jnp.concatenate([self._prefix(z_txt, txt_enc, txt_mask), before], axis=1)
        n = txt_mask.shape[1]
        mask = causal_mask(x.shape[1]) & self._keys(txt_mask)[:, None, None, :]
        # The output at z_txt (place n) predicts code 0, that at code i predicts code i + 1.
        return self._out(self.transformer(x, mask)[:, n:]) + self.bias[None]

    def prefill(self, z_txt: Array, txt_enc: Array, txt_mask: Array) -> tuple[Array, Past]:
        """Returns (logits [b, buckets] of code 0, the past with everything before it)."""
        x, keys = self._prefix(z_txt, txt_enc, txt_mask), self._keys(txt_mask)
        # n counts all places, those of codes to come included: the cache never changes its size.
        b, n = keys.shape
        mask = causal_mask(n)[:, :, : x.shape[1]] & keys[:, None, None, :]
        empty = self.transformer.empty_cache(b, n, self.width)
        x, cache = self.transformer.cached(x, mask, empty, 0)
        return self._out(x[:, -1]) + self.bias[None, 0], Past(cache, keys)

    def step(self, code: Array, place: Array, past: Past) -> tuple[Array, Past]:
        """Takes the code int32 [b] at `place`, 0 .. dims - 1.

        Returns (logits [b, buckets] of the next code, the past with this one).
        """
        x, keys = self._embed(code[:, None], place[None]), past.keys
        n = keys.shape[1]
        # The prefix takes the first n - dims places. Places after `at` are still zero in the cache.
        at = n - self.dims + place
        mask = keys & (jnp.arange(n) <= at)[None]
        x, cache = self.transformer.cached(x, mask[:, None, None, :], past.cache, at)
        return self._out(x[:, 0]) + self.bias[place + 1][None], Past(cache, keys)

    def _prefix(self, z_txt: Array, txt_enc: Array, txt_mask: Array) -> Array:
        n = txt_mask.shape[1]
        z_txt = jnp.where(txt_mask.any(axis=1)[:, None], z_txt, self.null_z_txt[None])
        x = jnp.concatenate([self.txt_enc(txt_enc), self.z_txt(z_txt)[:, None]], axis=1)
        # What follows the caption keeps its place, however short that is.
        places = jnp.concatenate([self.positions[:n], self.positions[None, self.context_length]])
        return x + places[None].astype(self.dtype)

    def _embed(self, codes: Array, places: Array) -> Array:
        positions = self.positions[self.context_length + 1 + places]
        return self.code(codes) + positions[None].astype(self.dtype)

    def _keys(self, txt_mask: Array) -> Array:
        return jnp.pad(txt_mask, ((0, 0), (0, 1 + self.dims)), constant_values=True)

    def _out(self, x: Array) -> Array:
        return self.out(self.norm(x))
