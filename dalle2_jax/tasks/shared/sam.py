"""Sharpness-aware minimisation per replica (SAM, 2010.01412; so trained unCLIP its CLIP).

A replica r, some examples of the batch, takes the gradient g_r of its own loss and moves the
weights up it, w_r = w + rho g_r / |g_r| (2010.01412, equation 2; per replica as in its section 4,
"m-sharpness"). The step then descends the loss at all w_r together; the way there is not
differentiated (equation 3).

It belongs to a task and not to the trainer: the replicas of a contrastive loss meet again in one
loss over the global batch, which sees each replica's embeddings from its own weights. The trainer
knows the loss alone, and could not tell the encoders from what compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import UserError
from dalle2_jax.parallel.fsdp import with_gathered_params
from dalle2_jax.parallel.shards import current_batch_axes
from dalle2_jax.types import Array, Params, PyTree

# Leaves that Flax's layers cast to their dtype before use. Norms, biases and tables keep theirs.
CAST = ("kernel", "embedding")


def encode_perturbed(
    encode: Callable[[Params, PyTree], PyTree],
    loss: Callable[[PyTree], Array],
    params: Params,
    inputs: PyTree,
    rho: float,
    replica_batch: int,
    dtype: Any = jnp.float32,
    recompute: bool = False,
) -> PyTree:
    """`encode(w_r, inputs of r)` [b, ...] for every replica r of `replica_batch` examples in a row.

    `inputs` and what `encode` returns have the batch [b, ...] first; `loss` makes a replica's
    scalar of its outputs. `dtype` is what `encode` computes in.

    A replica lies on one chip, which gathers the whole weights for it: beside its slices a chip
    holds one w in float32 on the way, then per replica one g_r and one w_r in `dtype`, the latter
    till the backward pass. With many replicas a chip, `recompute` keeps none of them and finds
    each anew there (10 / 6 of the time, by FLOPs). A step costs twice one without SAM.

    The sum w + rho g_r / |g_r| is made in float32 and then cast: a single change lies mostly below
    the steps of bfloat16, but the low bits of w spread the rounding, so it is right on average.

    Raises UserError where a chip's part of the batch is no multiple of `replica_batch`.
    """
    _, shards = current_batch_axes()
    batch_size = jax.tree.leaves(inputs)[0].shape[0]
    if batch_size % (shards * replica_batch):
        raise UserError(
            f"config.task.sam_replica_batch={replica_batch} must divide the {batch_size / shards:g}"
            f" examples that config.batch_size={batch_size} leaves each of {shards} batch shard(s)"
        )

    def cast(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p.astype(dtype) if path[-1].key in CAST else p, params
        )

    def perturbed(params: Params, inputs: PyTree) -> PyTree:
        # Stopped before, not after: within a loop the derivative of this gradient would be
        # computed, and then not used.
        here = cast(jax.lax.stop_gradient(params))
        grads = jax.grad(lambda p: loss(encode(p, inputs)))(here)
        # The norm adds up millions of squares, which bfloat16 would lose.
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        # One norm over all parameters, as in the paper; no gradient at all moves nothing.
        length = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
        # `params` is not stopped here, so the step's gradient reaches them through this sum with
        # factor 1: that of the loss at the moved weights.
        return cast(jax.tree.map(lambda p, g: p + length * g, params, grads))

    def shard(params: Params, inputs: PyTree) -> PyTree:
        def replica(inputs: PyTree) -> PyTree:
            return encode(perturbed(params, inputs), inputs)

        if jax.tree.leaves(inputs)[0].shape[0] == replica_batch:
            return replica(inputs)  # of a loop of one turn the TPU compiler computes all twice
        # [m, ...] -> [replicas, replica_batch, ...]; a loop, as each replica has its own weights.
        groups = jax.tree.map(lambda x: x.reshape(-1, replica_batch, *x.shape[1:]), inputs)
        out = jax.lax.map(jax.checkpoint(replica) if recompute else replica, groups)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return with_gathered_params(shard, params, inputs, dtype=dtype)
