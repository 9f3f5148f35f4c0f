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
import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.parallel.sharding import BATCH_AXES, flatten, path_name
from dalle2_jax.parallel.shards import batch_shards, on_shards
from dalle2_jax.types import Array, Params, PyTree

Groups = list[list[int]]
Specs = Mapping[tuple, PartitionSpec]
LARGE_SLICE = 2**18  # bytes: smaller ones the compiler gathers by adding up zeros, twice the bytes
# Of the `gathering` that is being traced within: how parameters are split, and the rings.
_HERE: contextvars.ContextVar[tuple[Specs, Sequence[Groups | None]]] = contextvars.ContextVar(
    "gathering", default=({}, [None])
)


@contextlib.contextmanager
def gathering(mesh: Mesh, *trees: PyTree) -> Iterator[None]:
    """Networks that are applied within run their layers on weights gathered from `mesh`.

    To be entered while tracing, within the context of `mesh`. `trees` are the parameters of all
    networks that are applied, a tree each, as ShapeDtypeStructs with a NamedSharding. Does nothing
    on a mesh of one shard, and for a layer whose rows the shards do not divide: there the compiler
    chooses.
    """
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if shards == 1:
        yield
        return

    def by_rows(x: Array) -> PartitionSpec:
        return PartitionSpec(axes, *[None] * (x.ndim - 1))

    specs = _specs(trees)
    rows = np.moveaxis(mesh.devices, 1, -1).reshape(-1, mesh.shape["fsdp"])
    rings = ring_groups(rows[0])
    if any(ring_groups(row) != rings for row in rows[1:]):
        rings = [None]
    within = False

    def _split(layer: nn.Module, params: Mapping[str, Array]) -> dict[str, PartitionSpec]:
        """Returns the shardings of those parameters of the layer that are split."""
        found = {name: specs.get((*layer.path, name, p.shape)) for name, p in params.items()}
        return {name: spec for name, spec in found.items() if spec and any(spec)}

    def divides(x: Any) -> bool:
        return getattr(x, "ndim", 0) > 0 and x.shape[0] % shards == 0

    def by_batch(x: Any) -> Any:
        if divides(x):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, by_rows(x)))
        return x

    def run(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal within
        layer = context.module
        per_shard = jax.sharding.get_abstract_mesh().manual_axes  # there all is whole already
        if within or per_shard or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        params = dict(layer.variables.get("params", {}))
        split = (
            {} if any(isinstance(p, Mapping) for p in params.values()) else _split(layer, params)
        )
        named = any(hasattr(x, "ndim") for x in kwargs.values())  # rows, or not: nobody says
        if not split or named or not args or not all(map(divides, args)):
            return jax.tree.map(by_batch, next_fun(*args, **kwargs))

        # Messages of the layer's own dtype. Cast here: within, the backward pass would gather from
        # a copy, which the compiler could not know for the same.
        dtype = getattr(layer, "dtype", None)
        params |= {name: params[name].astype(dtype or params[name].dtype) for name in split}

        def apply(params: Mapping[str, Array], *args: Array) -> Array:
            whole = {
                name: _gather(p, split[name], rings) if name in split else p
                for name, p in params.items()
            }
            return layer.clone(parent=None, name=None).apply({"params": whole}, *args, **kwargs)

        local = jax.shard_map(
            jax.checkpoint(apply, policy=_keep, prevent_cse=not _in_body(layer)),
            in_specs=(
                {name: split.get(name, PartitionSpec()) for name in params},
                *map(by_rows, args),
            ),
            out_specs=PartitionSpec(axes),
            axis_names=set(axes),  # "tensor" stays with the compiler
            check_vma=False,  # gathers over groups of an axis have no such types
        )
        within = True
        try:
            return local(params, *args)
        finally:
            within = False

    here = _HERE.set((specs, rings))
    try:
        with nn.intercept_methods(run):
            yield
    finally:
        _HERE.reset(here)


def networks(params: Params) -> Sequence[Params]:
    """The trees of several networks alike, as in {"first": ..., "last": ...}, for `gathering`:
    each knows its own paths alone. Else the one."""
    inner = list(params.values())
    whole = all(_is_tree(x) and any(map(_is_tree, x.values())) for x in inner)
    alike = whole and len({jax.tree.structure(x) for x in inner}) == 1
    return inner if alike and len(inner) > 1 else [params]


def _is_tree(x: Any) -> bool:
    return isinstance(x, Mapping)


def on_whole(
    function: Callable[..., PyTree], params: Params, *rows: PyTree, dtype: Any = None
) -> PyTree:
    """`function(params, *rows)` on each shard of the `rows` [b, ...], with all `params` at once.

    For what needs the whole network on one chip: each weight is gathered once in its own dtype, and
    its gradient reduce-scattered once, as `dtype` (None: its own). Outside of `gathering` how is
    left to the compiler.
    """
    axes, _ = batch_shards()
    specs, rings = _HERE.get()

    def split(path: tuple, x: Array) -> PartitionSpec:
        return specs.get((*path_name(path).split("/"), x.shape), PartitionSpec())

    places = jax.tree_util.tree_map_with_path(split, params)

    def gathered(x: Array, place: PartitionSpec) -> Array:
        return _gather(x, place, rings, dtype) if any(place) else x

    def shard(params: Params, *rows: PyTree) -> PyTree:
        return function(jax.tree.map(gathered, params, places), *rows)

    return on_shards(shard, axes, first=[places])(params, *rows)


def _specs(trees: Sequence[PyTree]) -> Specs:
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


def _in_body(layer: nn.Module) -> bool:
    """Returns whether nn.scan or nn.remat runs the layer; Flax binds what it transforms as a new
    root.

    Their backward pass is a program of its own, which gathers weights again, once. Elsewhere the
    compiler would see that the forward pass gathers the same and keep it, unless it is prevented.
    """
    while isinstance(layer.parent, nn.Module):
        layer = layer.parent
    return bool(layer.path)


def _keep(primitive: Any, *_: Any, **__: Any) -> bool:
    """All but gathered weights is kept for the backward pass. By primitive: a name would be that of
    a copy, and the gather's own result were kept."""
    return primitive is not jax.lax.all_gather_p


def _gather(
    x: Array, spec: PartitionSpec, rings: Sequence[Groups | None], dtype: Any = None
) -> Array:
    """A weight from its slices; its gradient is summed and sliced ring by ring, as `dtype`."""
    axis = spec.index("fsdp")
    # Over both dimensions of a flat torus at once, which the compiler does well. Over three it too
    # adds up zeros.
    stages = [None] if x.nbytes > LARGE_SLICE and len(rings) < 3 else rings

    def gathered(x: Array) -> Array:
        for groups in stages:
            x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
        return x

    def scatter(_: None, g: Array) -> tuple[Array]:
        g = g.astype(dtype or x.dtype)
        for groups in reversed(rings):
            g = jax.lax.psum_scatter(
                g, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=groups
            )
        return (g.astype(x.dtype),)

    gather = jax.custom_vjp(gathered)
    gather.defvjp(lambda x: (gathered(x), None), scatter)
    return gather(x)


def ring_groups(devices: Sequence[Any]) -> list[Groups | None]:
    """Stages in which an axis of `devices` is gathered, and in reverse order scattered, each along
    one dimension of the torus.

    The TPU compiler reduce-scatters along a physical ring alone; over several dimensions at once it
    reduces everything to everybody, twice the bytes. So it gathers small slices. Where devices have
    no coordinates, or not in rows, there is one stage over all (None).
    """
    coords: Any = [getattr(d, "coords", None) for d in devices]
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
    """Returns how many blocks, from the first, differ in one coordinate only, in the same way."""
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
