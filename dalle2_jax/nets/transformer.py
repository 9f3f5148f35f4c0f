"""The pre-norm transformer under CLIP's towers, the prior and the decoder's text encoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dalle2_jax.nets.attention import attention, merge_heads, split_heads
from dalle2_jax.nets.layers import LayerNorm
from dalle2_jax.nets.remat import rematerialised
from dalle2_jax.types import Array


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"gelu": exact_gelu, "quick_gelu": quick_gelu}


def causal_mask(length: int) -> Array:
    """bool [1, 1, length, length]: a position sees itself and what came before."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    mlp_ratio: float = 4.0  # the wide layer's width, of the width

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, None]:
        width = x.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        y = LayerNorm(name="norm1")(x)
        q, k, v = (split_heads(dense(width, name)(y), self.heads) for name in "qkv")
        x = x + dense(width, "out")(merge_heads(attention(q, k, v, mask)))
        y = dense(round(self.mlp_ratio * width), "fc1")(LayerNorm(name="norm2")(x))
        x = x + dense(width, "fc2")(ACTIVATIONS[self.activation](y))
        return x, None  # nn.scan wants (carry, output)


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

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        blocks = nn.scan(
            rematerialised(Block, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # typed by its default, 0
            length=self.depth,
        )
        block = blocks(self.heads, self.activation, self.dtype, self.mlp_ratio, name="blocks")
        return block(x.astype(self.dtype), mask)[0]
