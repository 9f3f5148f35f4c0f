"""Attention by the Pallas TPU kernel that JAX ships (splash attention; FlashAttention 2205.14135).

Of JAX's two kernels this one keeps a single float32 a query for its backward pass, where
`flash_attention` keeps rows of 128. Layouts have the sequence last: with 64 channels of a head
last, half of a TPU's 128 lanes would be padding.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.types import Array

MOST_CHANNELS = 128  # of a head: what the blocks below leave room for
_LANES = 128
_MOST_Q, _MOST_KV = 512, 1536  # of a block: what the 16 MiB of VMEM hold in the backward pass


def flash_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, interpret: bool = False
) -> Array:
    """q [b, n, heads, d], k, v [b, m, heads, d] -> [b, n, heads, d] in v's dtype.

    Args:
        mask: bool [1 or b, 1, 1, m], False at keys that no query attends to; one key at least is
            True.
        interpret: run it anywhere, slowly.

    For this device's arrays alone: the compiler cannot split a kernel.
    """
    # Imported late: it takes long, and sampling small images needs none of it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    b, n, heads, d = q.shape
    m = k.shape[1]
    (block_q, rows), (block_kv, keys) = _blocks(n, _MOST_Q), _blocks(m, _MOST_KV)
    one_block = block_kv == keys
    last = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        # The fused backward pass holds dq once a block of keys.
        use_fused_bwd_kernel=one_block,
        block_q_dq=None if one_block else block_q,
        block_kv_dq=None if one_block else block_kv,
        q_layout=last,
        k_layout=last,
        v_layout=last,
    )
    # Splash's own masks are constants of the program. Ours are data, so they go by segments below.
    full = splash.MultiHeadMask([splash.FullMask((rows, keys))] * heads)
    # One shard: rows and heads were split before, by `attention._on_every_device`.
    kernel = splash.make_splash_mha(
        full, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q, k, v = (
        # [b, n, heads, d] -> [b, heads, rows or keys, d]
        jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, length in ((q / math.sqrt(d), rows), (k, keys), (v, keys))
    )

    def segments(seen: Array) -> splash.SegmentIds:
        """Puts keys not `seen` [m], and the last block's padding, in a segment without queries."""
        # A query attends to keys of its own segment only: queries are 0, hidden keys 1.
        unseen = ~jnp.pad(seen, (0, keys - m))
        return splash.SegmentIds(jnp.zeros(rows, jnp.int32), unseen.astype(jnp.int32))

    if mask is not None:
        # `axis` is the axis of examples to map over; None: all examples share the segments.
        segment_ids, axis = jax.vmap(segments)(jnp.broadcast_to(mask[:, 0, 0], (b, m))), 0
    else:
        segment_ids, axis = None if keys == m else segments(jnp.ones(m, bool)), None
    out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, axis))(q, k, v, segment_ids)
    # Queries that fill up the last block are cut off, so they need no segment of their own.
    return out[:, :, :n].swapaxes(1, 2).astype(v.dtype)


def _blocks(n: int, most: int) -> tuple[int, int]:
    """Returns (length of a block, length of all) for as few blocks of at most `most` as hold n."""
    lanes = -(-n // _LANES)  # rounded up; in units of 128
    count = -(-lanes * _LANES // most)
    # Equal blocks: full ones and a short rest would be padded by up to a whole block.
    block = -(-lanes // count) * _LANES
    return block, count * block
