"""From rules in a config to a `NamedSharding` for every parameter.

The mesh has the three axes of `AXES`: a batch is split over the first two, parameters over
"fsdp" (each device keeps a slice and gathers before use) and "tensor" (a matrix product split
along one of its own axes). Rules are ordered pairs (regex, tactic); a path such as
`blocks/attn/qkv/kernel` takes the tactic of the first rule whose regex is found in it.

Tactics:
  "replicate"      every device holds the whole array
  "fsdp"           the largest axis that "fsdp" divides is split, first of those whose slices fill
                   a TPU's tiles (none: replicated); an array of fewer than `MIN_SPLIT` elements is
                   not worth a message and replicated
  "fsdp:N"         the same, with N in place of `MIN_SPLIT`
  "tensor:A"       axis A (may be negative) is split over "tensor"
  "tensor:A+fsdp"  the same, and the largest other axis over "fsdp"
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import UserError
from dalle2_jax.parallel.shards import BATCH_AXES
from dalle2_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
_TACTICS = "replicate, fsdp, fsdp:LEAST_SIZE, tensor:AXIS, tensor:AXIS+fsdp"
_AUTO = (AxisType.Auto,) * len(AXES)
MIN_SPLIT = 2**18  # elements: 1 MiB of float32
LARGE = 2**30  # bytes of parameters, from which on it matters how many are whole everywhere
MOST_WHOLE = 0.02  # of them
Rules = Sequence[tuple[str, str]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or `devices`); one size may be -1 and takes the rest.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    told = f"config.mesh {dict(zip(AXES, shape, strict=True))}"
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"{told}: sizes are positive, and at most one may be -1 (the rest)")
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // math.prod(s for s in shape if s > 0), 1)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"{told} does not fit {len(devices)} device(s): the sizes must multiply to that number"
        )
    return Mesh(np.array(_along_torus(devices)).reshape(shape), AXES, axis_types=_AUTO)


def _along_torus(devices: list[Any]) -> list[Any]:
    """In rows of the TPU's torus, slice by slice: neighbours in the mesh are neighbours there, and
    a collective along a row is one (see fsdp.ring_groups). Other devices as they come."""
    if not all(hasattr(device, "coords") for device in devices):
        return devices
    return sorted(
        devices,
        key=lambda d: (getattr(d, "slice_index", 0) or 0, tuple(d.coords), d.core_on_chip),
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 of a batch over "data" and "fsdp"; the "tensor" axis sees it whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where the mesh cannot split the global batch evenly."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"config.batch_size={batch_size} is not a multiple of {shards} (mesh data x fsdp)"
        )


def local_shards(mesh: Mesh, process_index: int | None = None) -> list[int]:
    """Returns which of the `batch_shards` parts of a batch are on this process's devices, in order.

    Along the torus they need not be neighbours: the chips of a host are a block of several rows. If
    the "tensor" axis spans hosts, several of them hold the same part.
    """
    process = jax.process_index() if process_index is None else process_index
    devices = mesh.devices.reshape(batch_shards(mesh), -1)
    return [i for i, row in enumerate(devices) if any(d.process_index == process for d in row)]


def local_rows(mesh: Mesh, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """int [rows]: the rows of a global batch, sorted, that this process's devices hold.

    Raises UserError where the mesh cannot split the batch evenly.
    """
    check_batch_size(batch_size, mesh)
    parts = np.arange(batch_size).reshape(batch_shards(mesh), -1)
    return parts[local_shards(mesh, process_index)].reshape(-1)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """A JAX key path as `blocks/attn/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _spec(shape: tuple[int, ...], tactic: str, mesh: Mesh, path: str) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    for part in tactic.split("+"):
        kind, _, argument = part.partition(":")
        if kind == "replicate" and not argument:
            continue
        if kind == "tensor" and re.fullmatch(r"-?\d+", argument):
            axis = int(argument)
            if not -len(shape) <= axis < len(shape) or shape[axis] % mesh.shape["tensor"]:
                raise UserError(
                    f"sharding tactic {tactic!r}: {path} {shape} has no axis {axis} that "
                    f"{mesh.shape['tensor']} tensor shards divide"
                )
            axes[axis] = "tensor"
        elif kind == "fsdp" and re.fullmatch(r"\d*", argument):
            size = mesh.shape["fsdp"]
            if math.prod(shape) < int(argument or MIN_SPLIT):
                continue
            free = [
                i for i, n in enumerate(shape) if axes[i] is None and n % size == 0 and n >= size
            ]
            if free and size > 1:
                axes[max(free, key=lambda i: (_fills_tiles(shape, i, size), shape[i]))] = "fsdp"
        else:
            raise UserError(f"unknown sharding tactic {tactic!r}; known: {_TACTICS}")
    return PartitionSpec(*axes)


def _fills_tiles(shape: tuple[int, ...], axis: int, parts: int) -> bool:
    """Returns whether slices along `axis` end where a TPU's tiles of 8 x 128 do.

    Others are sent padded, and the compiler gathers them by adding them up: twice the bytes.
    """
    tile = {len(shape) - 1: 128, len(shape) - 2: 8}.get(axis, 1)
    return shape[axis] // parts % tile == 0


def param_shardings(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The tree of `params` (arrays or ShapeDtypeStructs) with a NamedSharding at every leaf.

    Raises UserError for a path that no rule takes and for a rule that takes no path: either is
    how a typing mistake in a regex would otherwise replicate a large model in silence.
    """
    for regex, tactic in rules:
        if not isinstance(tactic, str):
            raise UserError(f"config.sharding_rules: {tactic!r} is no tactic; known: {_TACTICS}")
        try:
            re.compile(regex)
        except (TypeError, re.error) as error:
            told = f"config.sharding_rules: {regex!r} is no regular expression ({error})"
            raise UserError(told) from error
    used = [False] * len(rules)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for i, (regex, tactic) in enumerate(rules):
            if re.search(regex, name):
                used[i] = True
                return NamedSharding(mesh, _spec(tuple(leaf.shape), tactic, mesh, name))
        cure = "end with ('.*', 'replicate')"
        raise UserError(f"config.sharding_rules: no rule matches {name}; {cure}")

    placed = jax.tree_util.tree_map_with_path(place, params)
    for rule, hit in zip(rules, used, strict=True):
        if not hit:
            raise UserError(
                f"config.sharding_rules: {tuple(rule)} takes no parameter (a typing mistake, or an "
                f"earlier rule takes all it matches); paths look like {next(iter(flatten(params)))}"
            )
    return placed


def placed(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The tree of `params` as ShapeDtypeStructs that carry the shardings of `rules`."""
    places = param_shardings(params, rules, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )


def inherit_shardings(tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree that holds copies of `params` somewhere inside (optimiser state).

    A leaf whose path ends in a parameter's path and has its shape is placed as that parameter;
    what remains (counters) is replicated.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    places = flatten(shardings)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            name = path_name(path[start:])
            if shapes.get(name) == tuple(leaf.shape):
                return places[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def check_split(params: PyTree, mesh: Mesh) -> None:
    """Raises UserError where more than `MOST_WHOLE` of a large model's bytes lie whole on every
    device, though "fsdp" has several. `params` are ShapeDtypeStructs that carry their shardings."""
    leaves = flatten(params)
    sizes = {k: math.prod(x.shape) * np.dtype(x.dtype).itemsize for k, x in leaves.items()}
    fraction = replicated_bytes_fraction(params, jax.tree.map(lambda x: x.sharding, params))
    if mesh.shape["fsdp"] == 1 or sum(sizes.values()) < LARGE or fraction <= MOST_WHOLE:
        return
    whole = [k for k, x in leaves.items() if x.sharding.is_fully_replicated]
    name = max(whole, key=lambda k: sizes[k])
    raise UserError(
        f"{100 * fraction:.0f} % of the parameters' bytes would lie whole on every device, such as "
        f"{name} {leaves[name].shape}: choose config.sharding_rules that split it, or a mesh whose "
        f"fsdp (now {mesh.shape['fsdp']}) divides an axis of it, as with --config.mesh.data=4"
    )


def replicated_bytes_fraction(params: PyTree, shardings: PyTree) -> float:
    """The share of the bytes of `params` that every device holds whole, in [0, 1]."""
    whole = total = 0
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        whole += size * place.is_fully_replicated
    return whole / total if total else 0.0
