"""The pre-norm transformer under CLIP's towers, the prior and the decoder's text encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.nets.attention import attention, merge_heads, split_heads
from dalle2_jax.nets.layers import LayerNorm
from dalle2_jax.nets.remat import rematerialised
from dalle2_jax.types import Array


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    """The Gaussian error linear unit, without approximation."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"gelu": exact_gelu, "quick_gelu": quick_gelu}


def causal_mask(length: int) -> Array:
    """Returns bool [1, 1, length, length]: a position attends to itself and to those before it."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


class Cache(NamedTuple):
    """Keys and values of the places of a sequence seen so far, of all blocks or of one."""

    k: Array  # (depth) b n heads d
    v: Array

    def with_places(self, at: Array | int, k: Array, v: Array) -> Cache:
        """Returns one block's cache with k, v [b, m, heads, d] at the places from `at` on."""
        write = jax.lax.dynamic_update_slice_in_dim
        return Cache(*(write(old, x, at, 1) for old, x in zip(self, (k, v), strict=True)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With a `cache`, x [b, m, width] stands at its places from `at` on and attends to all of it.
    """

    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    mlp_ratio: float = 4.0  # the wide layer's width, of the width

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        cache: Cache | None = None,
        at: Array | int | None = None,
    ) -> tuple[Array, Cache | None]:
        width = x.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        y = LayerNorm(name="norm1")(x)
        q, k, v = (split_heads(dense(width, name)(y), self.heads) for name in "qkv")
        if cache is not None and at is not None:
            # All places [b, n, heads, d]; the caller's mask hides those that are not written yet.
            k, v = cache = cache.with_places(at, k, v)
        x = x + dense(width, "out")(merge_heads(attention(q, k, v, mask)))
        y = dense(round(self.mlp_ratio * width), "fc1")(LayerNorm(name="norm2")(x))
        x = x + dense(width, "fc2")(ACTIVATIONS[self.activation](y))
        return x, cache


class Transformer(nn.Module):
    """`depth` blocks over [b, n, width], scanned: one block is compiled, weights are stacked.

    `remat` names a policy of `nets.remat` for the blocks.
    """

    depth: int
    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"
    mlp_ratio: float = 4.0

    def setup(self) -> None:
        # The scan carries x through the blocks. Each block takes its slice of the cache
        # [depth, b, n, heads, d] and returns it updated, and the scan stacks them again.
        in_axes: Any = (nn.broadcast, 0, nn.broadcast)  # of mask, cache and place
        blocks: Any = nn.scan(
            rematerialised(Block, self.remat, scanned=True),
            variable_axes={"params": 0},  # each parameter is [depth, ...]
            split_rngs={"params": True},  # blocks start with different weights
            in_axes=in_axes,
            length=self.depth,
        )
        self.blocks = blocks(self.heads, self.activation, self.dtype, self.mlp_ratio)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        # None is an empty tree, which a scan may slice.
        return self.blocks(x.astype(self.dtype), mask, None, None)[0]

    def cached(self, x: Array, mask: Array, cache: Cache, at: Array | int) -> tuple[Array, Cache]:
        """Runs on x [b, m, width] at the places from `at` on of a sequence decoded step by step.

        `mask` [.., m, n] covers its places. Returns (the output there, the `cache` with them).
        """
        return self.blocks(x.astype(self.dtype), mask, cache, at)

    def empty_cache(self, b: int, n: int, width: int) -> Cache:
        """Returns a cache for b sequences of n places."""
        shape = self.depth, b, n, self.heads, width // self.heads
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
