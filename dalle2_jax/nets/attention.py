"""Multi-head attention over any keys, with logits and softmax in float32.

Short sequences take one einsum, which holds all logits [b, heads, n, m]. From `LONG` queries on no
platform holds them: a TPU runs the flash kernel (nets/flash.py), which keeps a running softmax over
blocks of keys; a CPU goes head by head through chunks of queries (nets/chunked.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dalle2_jax.nets.chunked import attention_by_chunks
from dalle2_jax.nets.flash import MOST_CHANNELS, flash_attention
from dalle2_jax.parallel.shards import BATCH_AXES, current_batch_axes
from dalle2_jax.types import Array

# Queries from which logits are not held whole. Compiled for v5e, 8 examples of 16 heads, the
# kernel needs 5.8 times less temporary memory at 512 x 512, 7.8 times at 1024 x 1284; at 256 x 516
# only 2.2 times, and the time that its padding takes there may well eat up what it gains.
LONG = 512
# "kernel": a TPU runs the flash kernel from LONG queries on. "checkpointed einsum": it runs the
# einsum there and recomputes its logits. "einsum": every platform does, at any length, and keeps
# them. A global, because networks call `attention` at depth and only estimates change it.
_implementation = "kernel"


@contextlib.contextmanager
def _tracing_with(what: str) -> Iterator[None]:
    global _implementation
    before, _implementation = _implementation, what
    try:
        yield
    finally:
        _implementation = before


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """Traces attention without Pallas kernels, on TPUs too.

    For estimates: XLA's compiler knows neither the time nor the FLOPs of a Pallas call. Enter it
    while tracing; programs that jit has traced before stay as they are.
    """
    return _tracing_with("checkpointed einsum")


def only_einsum() -> contextlib.AbstractContextManager[None]:
    """Traces attention as einsums on every platform and keeps all logits for the backward pass.

    For counting what must be computed, nothing of it twice; see `without_kernels`.
    """
    return _tracing_with("einsum")


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Scaled dot-product attention (Vaswani et al., 1706.03762, section 3.2.1).

    Args:
        q: [b, n, heads, d].
        k, v: [b, m, heads, d].
        mask: bool [1 or b, 1, 1 or n, m], True where a query may attend. A query that may attend
            nowhere averages over all keys; the kernel, though, needs masks of keys [1 or b, 1, 1,
            m] that leave one. With a mask of queries a TPU takes the einsum at any length:
            sequences that need one are short here.

    Returns:
        [b, n, heads, d] in v's dtype.
    """
    if q.shape[1] < LONG or _implementation == "einsum":
        return attention_by_einsum(q, k, v, mask)
    # Only q, k, v are kept for the backward pass: the gradient of a choice by platform hands on
    # what any of the platforms would keep.
    einsum = jax.checkpoint(attention_by_einsum)
    fits = (mask is None or mask.shape[2] == 1) and q.shape[-1] <= MOST_CHANNELS
    kernel = flash_attention if _implementation == "kernel" and fits else einsum

    def choose(q: Array, k: Array, v: Array, *mask: Array) -> Array:
        return jax.lax.platform_dependent(
            q, k, v, *mask, tpu=kernel, cpu=attention_by_chunks, default=einsum
        )

    return _on_every_device(choose, q, k, v, *(() if mask is None else (mask,)))


def attention_by_einsum(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """`attention` with all logits in memory."""
    q = q / math.sqrt(q.shape[-1])
    # Sums that are kept in float32: of two logits near 100 bfloat16 cannot tell which is larger.
    logits = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32)  # b heads n m
    if mask is not None:
        # The least float rather than -inf: a row without any key becomes uniform, not NaN.
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, v)


def _on_every_device(function: Callable[..., Array], *args: Array) -> Array:
    """Runs `function` on each device's rows and heads of the `args` of `attention`.

    The compiler can split neither a kernel nor a loop over a batch by itself. Rows are split like
    the batch of the mesh that this is traced in, heads over its other axes; what does not divide
    evenly is computed as a whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:  # no mesh, or this device's own part of one already
        return function(*args)
    batch_axes, shards = current_batch_axes()
    other_axes = tuple(axis for axis in mesh.auto_axes if axis not in BATCH_AXES)
    b, _, heads, _ = args[0].shape
    # batch_axes is () outside a split batch, and then splits nothing either.
    rows = batch_axes if b % shards == 0 else None
    divide = heads % math.prod(mesh.shape[axis] for axis in other_axes) == 0
    split = PartitionSpec(rows, None, other_axes if divide else None)
    # A mask [1, ...] is the same for all rows: every device has it whole.
    masks = [PartitionSpec(rows if mask.shape[0] == b else None) for mask in args[3:]]
    return jax.shard_map(
        function,
        in_specs=(split, split, split, *masks),
        out_specs=split,
        axis_names=set(mesh.auto_axes),
        check_vma=False,  # kernels have no such types
    )(*args)


def split_heads(x: Array, heads: int) -> Array:
    """[b, n, heads * d] -> [b, n, heads, d]."""
    return x.reshape(*x.shape[:-1], heads, -1)  # b n (k d) -> b n k d


def merge_heads(x: Array) -> Array:
    """[b, n, heads, d] -> [b, n, heads * d]."""
    return x.reshape(*x.shape[:-2], -1)  # b n k d -> b n (k d)
