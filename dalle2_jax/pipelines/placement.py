"""Placement of the arrays of sampling: weights on all devices or on the host, batches split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax.parallel import sharding
from dalle2_jax.pipelines import limits
from dalle2_jax.types import Params, PyTree


def cast(params: Params, dtype: Any) -> Params:
    """Returns `params` as sampling stores them: matrices in `dtype`, vectors in float32.

    `dtype` is what the networks compute in; bfloat16 halves the memory. Biases and norms are
    vectors, whose memory does not count and whose precision does. Leaves may be
    `jax.ShapeDtypeStruct` in place of arrays.
    """

    # Host arrays are cast on the host: the device never holds both copies of a large stage.
    def cast_one(x: Any) -> Any:
        if len(x.shape) < 2 or x.dtype == dtype:
            return x
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)

    return jax.tree.map(cast_one, params)


def should_offload(params: PyTree, memory: float) -> bool:
    """Returns whether parameters would fill more than half of a device of `memory` bytes.

    The rest is left for activations; such parameters wait on the host until their stage runs.
    """
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
    return size > memory / 2  # in bytes


def mesh() -> jax.sharding.Mesh:
    """Returns the mesh of all devices, on which batches are split."""
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def visible(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """Makes `mesh` visible while tracing; attention kernels need it to shard themselves."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def replicated() -> NamedSharding:
    """Returns the sharding of weights: a copy on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def by_batch() -> NamedSharding:
    """Returns the sharding of arrays [b, ...]: rows split over the devices."""
    return NamedSharding(mesh(), PartitionSpec("data"))


def batches(total: int, batch_size: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, int [b] numbers of its rows) of each batch of `total` rows.

    All batches have one size, a multiple of the number of devices, so that one compiled program
    serves them; the last batch repeats its last row. As in batches of 4 of 6 rows:

        (0, [0 1 2 3]), (4, [4 5 5 5])
    """
    # Fewer rows than `batch_size` make one smaller batch rather than mostly repeated rows.
    size = min(limits.whole_number("batch_size", batch_size), total)
    size = -(-size // jax.device_count()) * jax.device_count()  # the next multiple
    for start in range(0, total, size):
        yield start, np.minimum(np.arange(start, start + size), total - 1)
