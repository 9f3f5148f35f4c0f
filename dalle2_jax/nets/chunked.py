"""Exact attention that holds few logits at a time: those of one head and a chunk of queries."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dalle2_jax.types import Array

CHUNK = 256  # queries: their float32 logits over 1,284 keys are 1.3 MB, which caches hold


# For each example, for each head, for each chunk of queries:
#     logits = q[chunk, d] @ k[m, d].T         the only logits alive: [chunk, m]
#     out    = softmax(logits) @ v[m, d]       exact, since all m keys are there at once
def attention_by_chunks(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """`nets.attention.attention` in loops over examples, heads and chunks of queries.

    Two to three times as fast as one einsum on CPUs (benchmarks/attention.py), whose caches hold a
    chunk's logits. The backward pass computes them again, so none are kept.
    """
    n, d = q.shape[1], q.shape[-1]
    chunk = min(CHUNK, n)
    rows = -(-n // chunk) * chunk  # the last chunk is filled up with queries of zero

    def example(qkvm: tuple[Array, ...]) -> Array:
        q, k, v, *mask = qkvm  # k n d, k m d, k m d, and [1 or n, m] for all heads
        # `mask` is [] or one array. A mask of queries is cut like them; one of keys serves every
        # chunk.
        of_chunk = [_chunks(x, chunk) for x in mask if x.shape[0] == n]
        of_all = [x for x in mask if x.shape[0] != n]

        def head(qkv: tuple[Array, Array, Array]) -> Array:
            q, k, v = qkv

            # Without it the loop would stack the logits of all chunks for the backward pass.
            @jax.checkpoint
            def part(q: Array, k: Array, v: Array, *mask: Array) -> Array:
                logits = jnp.einsum("nd,md->nm", q, k, preferred_element_type=jnp.float32)
                if mask:
                    logits = jnp.where(mask[0], logits, jnp.finfo(jnp.float32).min)
                return jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v

            parts = (_chunks(q, chunk), *of_chunk)
            out = jax.lax.map(lambda x: part(x[0], k, v, *x[1:], *of_all), parts)
            # The queries that filled up the last chunk end here. Their rows are finite (uniform).
            return out.reshape(rows, d)[:n]

        return jax.lax.map(head, (q, k, v))

    q = q / math.sqrt(d)
    args = [x.swapaxes(1, 2) for x in (q, k, v)]  # b n k d -> b k n d
    if mask is not None:
        args.append(jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))[:, 0])
    return jax.lax.map(example, tuple(args)).swapaxes(1, 2)


def _chunks(x: Array, chunk: int) -> Array:
    """[n, d] -> [n / chunk, chunk, d], zeros at the end."""
    n, d = x.shape
    return jnp.pad(x, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, d)
