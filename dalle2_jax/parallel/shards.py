"""Running a function on each shard of a batch, where the shards matter to what it computes.

The trainer traces its steps within its mesh (train/step.py); outside one, and on a mesh that does
not split batches, the whole batch is the only shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")  # of the mesh (sharding.py): a batch is split over them


def batch_shards() -> tuple[tuple[str, ...], int]:
    """The mesh axes that a batch is split over here, and into how many shards: ((), 1) for none.

    Within `on_shards` a function sees one shard, so there it is ((), 1) again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
    count = math.prod(mesh.shape[axis] for axis in axes)
    return (axes, count) if count > 1 else ((), 1)


def whole_rows(x: jax.Array) -> jax.Array:
    """`x` [b, ...], its rows split like the batch's and each whole: what is cut or joined along an
    axis that "tensor" splits is else sent all to all, forth or back."""
    axes, _ = batch_shards()
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.auto_axes or mesh.shape["tensor"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes or None))


def on_shards(
    function: Callable[..., Any], axes: tuple[str, ...], first: Sequence[Any] = ()
) -> Callable[..., Any]:
    """`function` on this shard's part of every argument [b, ...]; so are its results put together.

    The first arguments are split as `first` says, a PartitionSpec for every leaf; what it leaves
    whole has its gradients summed over shards. Other mesh axes ("tensor") stay with the compiler.
    """
    if not axes:
        return function
    split = PartitionSpec(axes)

    def mapped(*args: Any) -> Any:
        specs = (*first, *(split,) * (len(args) - len(first)))
        # Unchecked: a gradient taken within a shard must stay that shard's own, where the checks
        # of varying axes would sum it over all of them.
        return jax.shard_map(
            function, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
        )(*args)

    return mapped
