"""Fully sharded data parallelism: a layer's weights are gathered where the layer runs.

Each of n devices keeps one n-th of every large parameter, of its gradient and of its optimiser
state (ZeRO stage 3, arXiv 1910.02054, section 5), but computes with whole weights on its own rows
of the batch. For a dense layer with W [d, k], of which each device keeps a slice w [d/n, k]:

    forward     W  = all_gather(w)              [d, k]
                y  = x W                        x [b/n, d] -> y [b/n, k];  W is dropped
    backward    W  = all_gather(w)              again, as it was not kept
                dx = dy W^T                     [b/n, d]
                dw = reduce_scatter(x^T dy)     [d, k] on each device -> the sum's slice [d/n, k]

Left to itself the compiler moves activations as readily as weights, and all-reduces whole gradients
where a reduce-scatter sends half the bytes. So here the program says how each layer runs.
`gathering` is a Flax interceptor around the loss: it sees each call of a module, and replaces the
call of a layer that owns split parameters by, in essence,

    def apply(slices, rows):
        weights = all_gather(slices)                     # its transpose is the reduce-scatter
        return layer.apply(weights, rows)

    y = shard_map(checkpoint(apply, keep everything but gathered weights))(params, x)

The networks know nothing of it. What owns no split parameter (norms, attention, noise, the loss)
stays under `jit` with global shapes, so a run computes the same on any mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.parallel.rings import Groups, ring_groups
from dalle2_jax.parallel.sharding import BATCH_AXES, flatten, path_name
from dalle2_jax.parallel.shards import current_batch_axes, on_shards
from dalle2_jax.types import Array, Params, PyTree

Specs = Mapping[tuple, PartitionSpec]
"""(*module path, name, shape) -> how that parameter is split over "fsdp"."""
Rings = Sequence[Groups | None]
"""The stages of a gather, see `rings.ring_groups`."""

LARGE_SLICE = 2**18
"""Bytes. The compiler gathers smaller slices by adding up arrays padded with zeros, which sends
twice the bytes, unless it is given rings."""

# The specs and rings of the `gathering` that is being traced, for `with_gathered_params`.
_CURRENT: contextvars.ContextVar[tuple[Specs, Rings]] = contextvars.ContextVar(
    "gathering", default=({}, [None])
)


@contextlib.contextmanager
def gathering(mesh: Mesh, *trees: PyTree) -> Iterator[None]:
    """Makes networks that are applied within the block gather their weights layer by layer.

    To be entered while tracing, where `mesh` is the current one. On a mesh of one shard it does
    nothing. Nor does it for a layer whose rows the shards do not divide evenly: there the compiler
    chooses.

    Args:
        mesh: has the axes `sharding.AXES`.
        *trees: the parameters of all networks that are applied, one tree for each network, as
            ShapeDtypeStructs with a NamedSharding (`sharding.with_shardings`). While tracing,
            parameters themselves do not show how they are split.
    """
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    if not axes:
        yield
        return
    interceptor = _Interceptor(mesh, axes, _specs(trees), _rings_of(mesh))
    token = _CURRENT.set((interceptor.specs, interceptor.rings))
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        _CURRENT.reset(token)


@dataclasses.dataclass(eq=False)
class _Interceptor:
    """Runs the layers of a network with gathered weights; Flax calls it for each method call."""

    mesh: Mesh
    axes: tuple[str, ...]  # of the mesh, that split the batch
    specs: Specs
    rings: Rings
    in_layer: bool = False  # within a layer that runs on gathered weights

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        # Within another shard_map (`with_gathered_params`) all weights are whole already.
        is_mapped = bool(jax.sharding.get_abstract_mesh().manual_axes)
        if self.in_layer or is_mapped or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        params = dict(layer.variables.get("params", {}))
        specs = self._split_params(layer, params)
        # An array that is passed by name may have rows of the batch or not; that is not known.
        named_arrays = any(hasattr(x, "ndim") for x in kwargs.values())
        if not specs or named_arrays or not args or not all(map(self._is_divisible, args)):
            return jax.tree.map(self._split_rows, next_fun(*args, **kwargs))
        self.in_layer = True
        try:
            return self._run(layer, params, specs, args, kwargs)
        finally:
            self.in_layer = False

    def _run(
        self,
        layer: nn.Module,
        params: dict[str, Array],
        specs: Mapping[str, PartitionSpec],
        args: tuple,
        kwargs: dict,
    ) -> Array:
        """Returns layer(*args, **kwargs), computed on each device's rows with gathered `params`."""
        # Weights are sent in the layer's own dtype. They are cast here, not in `apply`: there, the
        # backward pass would gather from a copy, which the compiler could not recognise as equal.
        dtype = getattr(layer, "dtype", None)
        cast = {name: params[name].astype(dtype or params[name].dtype) for name in specs}
        params = {**params, **cast}

        def apply(params: Mapping[str, Array], *args: Array) -> Any:
            gathered = {
                name: _gather(p, specs[name], self.rings) if name in specs else p
                for name, p in params.items()
            }
            detached = layer.clone(parent=None, name=None)
            return detached.apply({"params": gathered}, *args, **kwargs)

        mapped = jax.shard_map(
            jax.checkpoint(apply, policy=_keep, prevent_cse=not _is_transformed(layer)),
            in_specs=(
                {name: specs.get(name, PartitionSpec()) for name in params},
                *map(self._row_spec, args),
            ),
            out_specs=PartitionSpec(self.axes),
            axis_names=set(self.axes),  # "tensor" stays with the compiler
            check_vma=False,  # gathers over groups of an axis have no varying-axes types
        )
        return mapped(params, *args)

    def _split_params(self, layer: nn.Module, params: Mapping) -> dict[str, PartitionSpec]:
        """Returns {name: spec} of the layer's own parameters that are split; {} of a container."""
        if any(isinstance(p, Mapping) for p in params.values()):
            return {}  # parameters of inner layers, each of which is intercepted itself
        specs = {name: self.specs.get((*layer.path, name, p.shape)) for name, p in params.items()}
        return {name: spec for name, spec in specs.items() if spec and any(spec)}

    def _is_divisible(self, x: Any) -> bool:
        shards = math.prod(self.mesh.shape[axis] for axis in self.axes)
        return getattr(x, "ndim", 0) > 0 and x.shape[0] % shards == 0

    def _row_spec(self, x: Array) -> PartitionSpec:
        return PartitionSpec(self.axes, *[None] * (x.ndim - 1))

    def _split_rows(self, x: Any) -> Any:
        """Makes the compiler leave activations where their rows are."""
        if not self._is_divisible(x):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._row_spec(x)))


def _rings_of(mesh: Mesh) -> Rings:
    """Returns the stages along "fsdp", which must suit all of the mesh's rows of that axis."""
    rows = np.moveaxis(mesh.devices, 1, -1).reshape(-1, mesh.shape["fsdp"])
    rings = ring_groups(rows[0])
    return rings if all(ring_groups(row) == rings for row in rows[1:]) else [None]


def network_trees(params: Params) -> Sequence[Params]:
    """Returns the parameters of each network, for `gathering`.

    A task may train several equal networks, {"first": tree, "last": tree}, and each knows its own
    paths only. Any other `params` are one network's.
    """
    inner = list(params.values())
    if len(inner) < 2 or not all(_is_network(tree) for tree in inner):
        return [params]
    alike = len({jax.tree.structure(tree) for tree in inner}) == 1
    return inner if alike else [params]


def _is_network(tree: Any) -> bool:
    """Returns whether `tree` holds modules, rather than being one layer or one array."""
    return isinstance(tree, Mapping) and any(isinstance(x, Mapping) for x in tree.values())


def with_gathered_params(
    function: Callable[..., PyTree], params: Params, *rows: PyTree, dtype: Any = None
) -> PyTree:
    """Returns `function(params, *rows)`, run on each shard of `rows` with all `params` at once.

    For what needs a whole network on one chip. Each weight is gathered once, in its own dtype, and
    its gradient is reduce-scattered once. Outside of `gathering` the compiler chooses how.

    Args:
        function: (params, *rows of one shard) -> trees of arrays [b / shards, ...].
        params: the parameters of a network that `gathering` was given.
        *rows: trees of arrays [b, ...].
        dtype: in which gradients are sent; None: in their parameter's.
    """
    axes, _ = current_batch_axes()
    all_specs, rings = _CURRENT.get()

    def spec_of(path: tuple, x: Array) -> PartitionSpec:
        return all_specs.get((*path_name(path).split("/"), x.shape), PartitionSpec())

    specs = jax.tree_util.tree_map_with_path(spec_of, params)

    def gather(x: Array, spec: PartitionSpec) -> Array:
        return _gather(x, spec, rings, dtype) if any(spec) else x

    def on_shard(params: Params, *rows: PyTree) -> PyTree:
        return function(jax.tree.map(gather, params, specs), *rows)

    return on_shards(on_shard, axes, first_specs=[specs])(params, *rows)


def _specs(trees: Sequence[PyTree]) -> Specs:
    """Returns how the parameters of `trees` are split over "fsdp".

    A layer in `nn.scan` sees one block of a stack, of the stack's shape without axis 0, so a
    parameter that is not split there is listed under that shape, too.
    """
    specs = {}
    for name, leaf in itertools.chain.from_iterable(flatten(tree).items() for tree in trees):
        path, axes = tuple(name.split("/")), tuple(leaf.sharding.spec)
        axes = tuple("fsdp" if axis == "fsdp" else None for axis in axes)
        axes += (None,) * (len(leaf.shape) - len(axes))
        specs[(*path, tuple(leaf.shape))] = PartitionSpec(*axes)
        if axes and axes[0] is None:
            specs.setdefault((*path, tuple(leaf.shape[1:])), PartitionSpec(*axes[1:]))
    return specs


def _is_transformed(layer: nn.Module) -> bool:
    """Returns whether `nn.scan` or `nn.remat` runs the layer: Flax makes it a root with a path.

    Their backward pass is a program of its own, which gathers the weights again by itself.
    Elsewhere the compiler would notice that the forward pass gathers the same and keep its result,
    unless `jax.checkpoint` prevents that.
    """
    while isinstance(layer.parent, nn.Module):
        layer = layer.parent
    return bool(layer.path)


def _keep(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: keeps everything but gathered weights for the backward pass.

    By the primitive: a `checkpoint_name` would name a copy, and the gather's result would be kept.
    """
    return primitive is not jax.lax.all_gather_p


def _gather(x: Array, spec: PartitionSpec, rings: Rings, dtype: Any = None) -> Array:
    """Returns a whole weight from its slices `x`, within `shard_map`.

    Its gradient is summed and sliced ring by ring, in `dtype` (None: in that of `x`).
    """
    axis = spec.index("fsdp")
    # The compiler gathers large slices well over both dimensions of a flat torus at once; over
    # three it, too, adds up arrays of zeros.
    stages = [None] if x.nbytes > LARGE_SLICE and len(rings) < 3 else rings

    def all_gather(x: Array) -> Array:
        for groups in stages:
            x = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
        return x

    def reduce_scatter(_: None, g: Array) -> tuple[Array]:
        g = g.astype(dtype or x.dtype)
        for groups in reversed(rings):
            g = jax.lax.psum_scatter(
                g, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=groups
            )
        return (g.astype(x.dtype),)

    gather = jax.custom_vjp(all_gather)
    gather.defvjp(lambda x: (all_gather(x), None), reduce_scatter)
    return gather(x)
