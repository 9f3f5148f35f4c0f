"""The mesh of devices, and rules that say how parameters are split over it.

The mesh has three axes. In a forward pass on data x fsdp x tensor = 2 x 4 x 2 devices:

    batch        [b, ...]   is split over "data" and "fsdp", here into 8 parts
    parameters   [d, k]     are split over "fsdp": each device keeps a slice, and gathers the whole
                            before it is used (`fsdp`)
                            and over "tensor": a matrix product is split along one of its own axes,
                            and each device computes its part of the result
    over "data" parameters are copies: more devices, the same memory for each

Rules are data of a config, ordered pairs (regex, tactic); networks carry no annotation. A parameter
has a path such as `blocks/attn/qkv/kernel`, and takes the tactic of the first rule whose regex is
found in it. Tactics:

  "replicate"      Every device holds the whole array.
  "fsdp"           One axis is split over "fsdp": the largest that divides evenly, preferably of
                   those whose slices fill a TPU's tiles. If none divides, or if the array has fewer
                   than `MIN_SPLIT` elements, which is not worth a message, it is replicated.
  "fsdp:N"         The same, with N in place of `MIN_SPLIT`.
  "tensor:A"       Axis A (may be negative) is split over "tensor".
  "tensor:A+fsdp"  Axis A is split over "tensor", and the largest other axis over "fsdp".

As in

    config.sharding_rules = (
        (r"(qkv|fc1)/kernel", "tensor:-1+fsdp"),   # columns: no communication within the product
        (r"(out|fc2)/kernel", "tensor:-2+fsdp"),   # rows: the partial sums are added up
        (r".*", "fsdp"),
    )
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
MIN_SPLIT = 2**18
"""Elements from which the tactic "fsdp" splits an array: 1 MiB of float32."""
LARGE_MODEL = 2**30
"""Bytes of parameters from which replicating them on every device is a mistake."""
MAX_REPLICATED = 0.02
"""The fraction of a large model's bytes that may be replicated: biases, scales."""
Rules = Sequence[tuple[str, str]]
_TACTICS = "replicate, fsdp, fsdp:LEAST_SIZE, tensor:AXIS, tensor:AXIS+fsdp"
_AUTO = (AxisType.Auto,) * len(AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices, or over `devices`.

    Args:
        sizes: axis -> size, 1 if missing. One size may be -1: what the others leave.
        devices: None: those of all processes.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    where = f"config.mesh {dict(zip(AXES, shape, strict=True))}"
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"{where}: sizes are positive, and at most one may be -1 (the rest)")
    if -1 in shape:
        # At least 1, so that sizes that are too large fail below, with the message for them.
        shape[shape.index(-1)] = max(len(devices) // math.prod(s for s in shape if s > 0), 1)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"{where} does not fit {len(devices)} device(s): the sizes must multiply to that number"
        )
    return Mesh(np.array(_along_torus(devices)).reshape(shape), AXES, axis_types=_AUTO)


def _along_torus(devices: list[Any]) -> list[Any]:
    """Returns devices slice by slice in the order of their coordinates on the TPU's torus.

    Neighbours in the mesh are then neighbours on the torus, and a collective along an axis of the
    mesh is one along its rings (`rings.ring_groups`). Devices without coordinates stay in order.
    """
    if not all(hasattr(device, "coords") for device in devices):
        return devices
    return sorted(
        devices,
        key=lambda d: (getattr(d, "slice_index", 0) or 0, tuple(d.coords), d.core_on_chip),
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [b, ...]: over "data" and "fsdp", copied over "tensor"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if the mesh cannot split the global batch evenly."""
    shards = num_batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"config.batch_size={batch_size} is not a multiple of {shards} (mesh data x fsdp)"
        )


def local_shards(mesh: Mesh, process_index: int | None = None) -> list[int]:
    """Returns which parts of a batch are on the devices of a process, in order.

    They need not be consecutive: a host's chips are a block of several rows of the torus. Where
    the "tensor" axis spans hosts, several hosts hold the same part.

    Args:
        process_index: None: this process.
    """
    process = jax.process_index() if process_index is None else process_index
    devices = mesh.devices.reshape(num_batch_shards(mesh), -1)
    return [i for i, row in enumerate(devices) if any(d.process_index == process for d in row)]


def local_rows(mesh: Mesh, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """Returns the rows of a global batch that are on the devices of a process, int [rows], sorted.

    An input pipeline reads no others.

    Args:
        process_index: None: this process.

    Raises:
        UserError: the mesh cannot split the batch evenly.
    """
    check_batch_size(batch_size, mesh)
    parts = np.arange(batch_size).reshape(num_batch_shards(mesh), -1)
    return parts[local_shards(mesh, process_index)].reshape(-1)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a JAX key path as `blocks/attn/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns {path: leaf} of a tree, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _spec(shape: tuple[int, ...], tactic: str, mesh: Mesh, path: str) -> PartitionSpec:
    """Returns how a tactic splits the array at `path`; raises UserError if it cannot."""
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
            if math.prod(shape) >= int(argument or MIN_SPLIT):
                free = [i for i, mesh_axis in enumerate(axes) if mesh_axis is None]
                axis = _fsdp_axis(shape, free, mesh.shape["fsdp"])
                if axis is not None:
                    axes[axis] = "fsdp"
        else:
            raise UserError(f"unknown sharding tactic {tactic!r}; known: {_TACTICS}")
    return PartitionSpec(*axes)


def _fsdp_axis(shape: tuple[int, ...], free: Sequence[int], parts: int) -> int | None:
    """Returns the axis to split into `parts`, one of `free`; None if none divides evenly."""
    divisible = [i for i in free if shape[i] >= parts and shape[i] % parts == 0]
    if not divisible or parts == 1:
        return None
    return max(divisible, key=lambda i: (_fills_tiles(shape, i, parts), shape[i]))


def _fills_tiles(shape: tuple[int, ...], axis: int, parts: int) -> bool:
    """Returns whether slices along `axis` end where a TPU's tiles of 8 x 128 do.

    Other slices are sent padded, and the compiler gathers them by adding up arrays of zeros, which
    is twice the bytes.
    """
    tile = {len(shape) - 1: 128, len(shape) - 2: 8}.get(axis, 1)
    return shape[axis] // parts % tile == 0


def param_shardings(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Returns the tree of `params` with a NamedSharding in place of every leaf.

    Args:
        params: arrays or ShapeDtypeStructs.
        rules: see the module's docstring.

    Raises:
        UserError: a path that no rule matches, a rule that takes no path, or a tactic that is
            unknown or does not suit a shape. A mistyped regex would else silently replicate a
            large model.
    """
    # Before they are used: a rule may be wrong and take no path.
    for regex, tactic in rules:
        if not isinstance(tactic, str):
            raise UserError(f"config.sharding_rules: {tactic!r} is no tactic; known: {_TACTICS}")
        try:
            re.compile(regex)
        except (TypeError, re.error) as error:
            raise UserError(
                f"config.sharding_rules: {regex!r} is no regular expression ({error})"
            ) from error
    used = [False] * len(rules)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for i, (regex, tactic) in enumerate(rules):  # the first that matches decides
            if re.search(regex, name):
                used[i] = True
                return NamedSharding(mesh, _spec(tuple(leaf.shape), tactic, mesh, name))
        raise UserError(
            f"config.sharding_rules: no rule matches {name}; end with ('.*', 'replicate')"
        )

    shardings = jax.tree_util.tree_map_with_path(place, params)
    for rule, is_used in zip(rules, used, strict=True):
        if not is_used:
            raise UserError(
                f"config.sharding_rules: {tuple(rule)} takes no parameter (a typing mistake, or an "
                f"earlier rule takes all it matches); paths look like {next(iter(flatten(params)))}"
            )
    return shardings


def with_shardings(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Returns the tree of `params` as ShapeDtypeStructs that carry the shardings of `rules`.

    Raises UserError as `param_shardings` does.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        param_shardings(params, rules, mesh),
    )


def inherit_shardings(tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Returns shardings for a tree that holds copies of `params` somewhere inside.

    Optimiser state does: a leaf whose path ends in a parameter's path and that has its shape is
    split as that parameter is. Everything else (counters) is replicated.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    param_places = flatten(shardings)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):  # the longest ending first
            name = path_name(path[start:])
            if shapes.get(name) == tuple(leaf.shape):
                return param_places[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def check_split(params: PyTree, mesh: Mesh) -> None:
    """Raises UserError if much of a large model would be replicated, though "fsdp" could split it.

    `params` are ShapeDtypeStructs that carry their shardings. See `LARGE_MODEL`, `MAX_REPLICATED`.
    """
    leaves = flatten(params)
    sizes = {name: math.prod(x.shape) * np.dtype(x.dtype).itemsize for name, x in leaves.items()}
    fraction = replicated_bytes_fraction(params, jax.tree.map(lambda x: x.sharding, params))
    if mesh.shape["fsdp"] == 1 or sum(sizes.values()) < LARGE_MODEL or fraction <= MAX_REPLICATED:
        return
    # The message names the largest, which is most worth splitting.
    replicated_names = [k for k, x in leaves.items() if x.sharding.is_fully_replicated]
    name = max(replicated_names, key=lambda k: sizes[k])
    raise UserError(
        f"{100 * fraction:.0f} % of the parameters' bytes would be whole on every device, such as "
        f"{name} {leaves[name].shape}: choose config.sharding_rules that split it, or a mesh whose "
        f"fsdp (now {mesh.shape['fsdp']}) divides an axis of it, as with --config.mesh.data=4"
    )


def replicated_bytes_fraction(params: PyTree, shardings: PyTree) -> float:
    """Returns the fraction of the bytes of `params` that every device holds whole, in [0, 1]."""
    replicated_bytes = total_bytes = 0
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total_bytes += size
        replicated_bytes += size * place.is_fully_replicated
    return replicated_bytes / total_bytes if total_bytes else 0.0
