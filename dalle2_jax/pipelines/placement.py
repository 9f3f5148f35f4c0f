"""Where drawing's arrays lie: weights on all devices or waiting on the host, batches split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax.parallel import sharding
from dalle2_jax.sampling.stage import Progress
from dalle2_jax.types import Params, PyTree
from dalle2_jax.validation import arguments

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def stored(params: Params, dtype: Any) -> Params:
    """`params` as drawing keeps them: matrices in the dtype that networks compute in, and half the
    memory where that is bfloat16; vectors (biases, norms) in float32. Shapes serve as arrays."""

    def cast(x: Any) -> Any:
        if len(x.shape) < 2 or x.dtype == dtype:
            return x
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)

    return jax.tree.map(cast, params)


def waits(params: PyTree, memory: float) -> bool:
    """Whether parameters (arrays or shapes) are better kept off a device of `memory` bytes until
    they are used: more than half of it would be theirs, which a large picture needs to be drawn."""
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(params))
    return size > memory / 2


def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def on_mesh(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """Within, what is traced finds the mesh: kernels cannot be split over devices without."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def replicated() -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec())


def by_batch() -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec("data"))


def places(total: int, batch_size: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(its first row, its rows) of each batch; all are of one size, a multiple of the devices: the
    last is filled up with its last row."""
    size = min(arguments.whole("batch_size", batch_size, 1), total)
    size = -(-size // jax.device_count()) * jax.device_count()
    for start in range(0, total, size):
        yield start, np.minimum(np.arange(start, start + size), total - 1)


def overall(
    progress: StageProgress | None, start: int, size: int, total: int
) -> Callable[[str], Progress | None]:
    """stage -> Progress that counts the steps of all batches together, in that which begins at row
    `start` of `total`, where a batch has `size`."""
    if progress is None:
        return lambda stage: None
    batch, batches = start // size, -(-total // size)

    def stage_progress(stage: str) -> Progress:
        return lambda done, steps: progress(stage, batch * steps + done, batches * steps)

    return stage_progress
