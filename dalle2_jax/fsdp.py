"""Fully sharded data parallelism: a layer's weights are gathered where the layer runs.

Parameters split over "fsdp" (ZeRO stage 3, 1910.02054, section 5) are of use only whole. Left to
itself the compiler moves activations as gladly as weights, and reduces gradients whole. Here every
layer of a Flax network that owns a split parameter runs under `shard_map` instead: on this device's
rows of the batch, with weights gathered in the layer's own dtype. The transpose of that gather is
a reduce-scatter of the gradient; gathered weights are never kept for the backward pass.

The networks know nothing of it: `gathering` is a Flax interceptor around the loss. What it does
not touch (norms, attention, noise, the loss) stays under `jit` with global meaning, so that a run
is the same on any mesh.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.sharding import BATCH_AXES, batch_shards, flatten
from dalle2_jax.types import Array, PyTree

Groups = list[list[int]]
_GATHERED = "gathered"
_KEEP = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)


@contextlib.contextmanager
def gathering(mesh: Mesh, *trees: PyTree):
    """Networks that are applied within run their layers on weights gathered from `mesh`.

    `trees` hold the parameters (arrays or ShapeDtypeStructs with a NamedSharding) of all networks
    that are applied. Does nothing on a mesh of one shard, and for a layer whose rows the shards do
    not divide: there the compiler chooses.
    """
    shards = batch_shards(mesh)
    if shards == 1:
        yield
        return
    specs = _specs(trees)
    rings = ring_groups([d for d in mesh.devices[0, :, 0]])
    manual = frozenset(BATCH_AXES if mesh.shape["tensor"] > 1 else mesh.axis_names)
    within = False

    def by_batch(x: Any) -> Any:
        if getattr(x, "ndim", 0) and x.shape[0] % shards == 0:
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, batch_spec(x.ndim)))
        return x

    def run(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal within
        layer = context.module
        if within or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        params = layer.variables.get("params", {})
        found = {name: specs.get((*layer.path, name, jax.numpy.shape(p))) for name, p in params.items()
                 if not isinstance(p, Mapping)}
        split = {name: spec for name, spec in found.items() if spec and any(spec)}
        whole_rows = all(x.ndim and x.shape[0] % shards == 0 for x in args)
        if not split or len(found) < len(params) or kwargs or not whole_rows:
            return jax.tree.map(by_batch, next_fun(*args, **kwargs))

        def apply(params: Mapping[str, Array], *args: Array) -> Array:
            dtype = getattr(layer, "dtype", None)
            whole = {
                name: _gather(p if dtype is None else p.astype(dtype), split.get(name), rings)
                for name, p in params.items()
            }
            return layer.clone(parent=None, name=None).apply({"params": whole}, *args)

        local = jax.shard_map(
            jax.checkpoint(apply, policy=_KEEP, prevent_cse=False),
            mesh=mesh,
            in_specs=(
                {name: split.get(name, PartitionSpec()) for name in params},
                *(batch_spec(x.ndim) for x in args),
            ),
            out_specs=PartitionSpec(BATCH_AXES),
            axis_names=manual,
            check_vma=False,  # gathers over groups of an axis have no such types
        )
        within = True
        try:
            return local(dict(params), *args)
        finally:
            within = False

    with nn.intercept_methods(run):
        yield


def batch_spec(ndim: int) -> PartitionSpec:
    return PartitionSpec(BATCH_AXES, *[None] * (ndim - 1))


def _specs(trees: Sequence[PyTree]) -> dict[tuple, PartitionSpec]:
    """(module path..., name, shape) -> how that parameter is split over "fsdp".

    A scanned layer sees one block of a stack: its shape is that of the stack but for axis 0.
    """
    found = {}
    for name, leaf in itertools.chain.from_iterable(flatten(tree).items() for tree in trees):
        path, spec = tuple(name.split("/")), tuple(leaf.sharding.spec)
        spec = tuple("fsdp" if axis == "fsdp" else None for axis in spec)
        spec += (None,) * (len(leaf.shape) - len(spec))
        found[(*path, tuple(leaf.shape))] = PartitionSpec(*spec)
        if spec and spec[0] is None:
            found.setdefault((*path, tuple(leaf.shape[1:])), PartitionSpec(*spec[1:]))
    return found


def _gather(x: Array, spec: PartitionSpec | None, rings: Sequence[Groups]) -> Array:
    if spec is None:
        return x
    axis = spec.index("fsdp")
    for groups in rings:
        x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
    return checkpoint_name(x, _GATHERED)


def ring_groups(devices: Sequence[Any]) -> list[Groups | None]:
    """Stages in which an axis of `devices` is gathered, each along one dimension of the torus.

    The TPU compiler reduce-scatters along a physical ring alone; over several dimensions at once it
    reduces everything to everybody, twice the bytes. Where devices have no coordinates, or not in
    rows, there is one stage over all (None).
    """
    coords = [getattr(d, "coords", None) for d in devices]
    if None in coords or len(set(map(tuple, coords))) < len(coords):
        return [None]
    stages, block, n = [], 1, len(coords)  # block: devices that earlier stages have gathered
    while block < n:
        length = _run(coords, block)
        if length == 1:
            return [None]
        # members of a ring: `length` steps of `block` devices
        starts = [i for i in range(n) if (i // block) % length == 0]
        stages.append([[start + block * k for k in range(length)] for start in starts])
        block *= length
    return stages if len(stages) > 1 else [None]


def _run(coords: Sequence[Sequence[int]], block: int) -> int:
    """How many blocks from the first on differ in one coordinate alone, everywhere alike."""
    n, best = len(coords), 1
    for length in range(2, n // block + 1):
        if n % (block * length):
            continue
        rings = [
            [coords[i + block * k] for k in range(length)]
            for i in range(n)
            if (i // block) % length == 0
        ]
        changing = {
            axis
            for ring in rings
            for axis in range(len(coords[0]))
            if len({c[axis] for c in ring}) > 1
        }
        if len(changing) == 1:
            best = length
    return best
