"""Multi-head attention over any keys, with softmax in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dalle2_jax.types import Array


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Scaled dot-product attention (Vaswani et al., 1706.03762, section 3.2.1).

    q [b, n, heads, d]; k, v [b, m, heads, d]; `mask` bool, [1 or b, 1, 1 or n, m], True where a
    query may look. Returns [b, n, heads, d] in v's dtype. A query that may look nowhere
    averages over all keys.
    """
    q = q / math.sqrt(q.shape[-1])
    # Sums that are kept in float32: of two logits near 100 bfloat16 cannot tell which is larger.
    logits = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, v)


def split_heads(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, -1)  # b n (k d) -> b n k d


def merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)  # b n k d -> b n (k d)
