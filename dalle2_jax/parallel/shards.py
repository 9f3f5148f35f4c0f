"""Mapping a function over the shards of a batch, where its result depends on the split.

Most of the program is traced with global shapes, and the compiler splits it. Some computations have
to know the shards: a contrastive loss that goes round a ring of them, a network that is computed as
a whole on each. `on_shards` runs such a function once for each shard. It finds the mesh that the
trainer traces its steps in (`train.step`); without a mesh, or on one that does not split batches,
the whole batch is the only shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
"""The axes of the mesh (`sharding.AXES`) that a batch is split over."""


def current_batch_axes() -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes that a batch is split over where this is traced, and the shard count.

    ((), 1) if it is not split. That is so, too, within `on_shards`, where a function sees one shard
    as its whole batch.
    """
    # Within shard_map its axes are manual, no longer auto.
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
    count = math.prod(mesh.shape[axis] for axis in axes)
    return (axes, count) if count > 1 else ((), 1)


def keep_rows_whole(x: jax.Array) -> jax.Array:
    """Returns `x` [b, ...], split over the batch axes only.

    To be used before `x` is padded, cut or joined along an axis that "tensor" may split: the shards
    of that axis would no longer be equal, and the compiler would exchange all of them, forth or
    back.
    """
    axes, _ = current_batch_axes()
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.auto_axes or mesh.shape["tensor"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes or None))


def on_shards(
    function: Callable[..., Any], axes: tuple[str, ...], first_specs: Sequence[Any] = ()
) -> Callable[..., Any]:
    """Returns `function` as run on each shard of its arguments [b, ...]; results are concatenated.

    Args:
        function: arrays [b / shards, ...] -> arrays [b / shards, ...].
        axes: the mesh axes of the shards, as `current_batch_axes` returns them; () runs `function`
            on everything. Other axes of the mesh ("tensor") stay with the compiler.
        first_specs: how the first arguments are split, if not by rows: for each a tree of
            PartitionSpec. The gradients of what a spec does not split are summed over shards.
    """
    if not axes:
        return function
    by_rows = PartitionSpec(axes)

    def mapped(*args: Any) -> Any:
        specs = (*first_specs, *(by_rows,) * (len(args) - len(first_specs)))
        # Unchecked: a gradient that is taken inside must stay that of its shard, and the checks of
        # varying axes would sum it over all of them.
        return jax.shard_map(
            function, in_specs=specs, out_specs=by_rows, axis_names=set(axes), check_vma=False
        )(*args)

    return mapped
