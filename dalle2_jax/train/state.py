"""The state that training carries from step to step, and its creation in its shards."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax.sharding import Mesh

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import model_folder, model_names
from dalle2_jax.train.optimizer import Optimizer
from dalle2_jax.types import Array, Params, PyTree, Task
from dalle2_jax.validation.sections import check_keys

# Steps count up from 0 and feed `fold_in`; these streams count down from the top, so that no
# initialisation, preview or evaluation ever shares a key with a step.
INIT_STREAM = np.uint32(2**32 - 1)
PREVIEW_STREAM = np.uint32(2**32 - 2)
EVAL_STREAM = np.uint32(2**32 - 3)
MEASURE_STREAM = np.uint32(2**32 - 4)


# config.offload -> field of the state
OFFLOADABLE = {"ema": "ema_params", "optimizer": "opt_state"}
HOST_MEMORY = "pinned_host"


class Faults(struct.PyTreeNode):
    """Counters of skipped steps and batches (int32 scalars).

    They are checkpointed, so that a resumed run makes the same recovery decisions as an
    uninterrupted one.
    """

    skipped: Array  # steps of this state whose update was left out
    in_a_row: Array  # those since the last good step: 0 after a good one
    passed_over: Array  # batches that rollbacks left out


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint holds."""

    step: Array  # int32 scalar: batches trained on, skipped ones included
    params: Params
    ema_params: Params  # what is evaluated, previewed and exported
    opt_state: PyTree  # of optax
    faults: Faults

    @property
    def position(self) -> Array:
        """Position in the data of the next batch.

        The batch's noise is sampled from this number too, so that a batch keeps its noise wherever
        in a run it is trained on.
        """
        return self.step + self.faults.passed_over

    @property
    def good_steps(self) -> Array:
        """Number of steps that made their update, which schedules and averages count."""
        return self.step - self.faults.skipped


def stream(seed: int, salt: np.uint32) -> Array:
    """Returns a key for a use that is not a training step."""
    return jax.random.fold_in(jax.random.key(seed), salt)


def _create(task: Task, optimizer: Optimizer, seed: int) -> TrainState:
    params = task.init(stream(seed, INIT_STREAM))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # its own buffers: the state is donated
        opt_state=optimizer.tx.init(params),
        faults=Faults(*(jnp.zeros((), jnp.int32) for _ in range(3))),
    )


def offloaded(names: str) -> dict[str, bool]:
    """Returns {"ema": ..., "optimizer": ...}: which parts of the state wait in the hosts' memory.

    Args: `names` is config.offload. Raises UserError for an unknown name.
    """
    parts = [name.strip() for name in names.split(",") if name.strip()]
    check_keys(parts, OFFLOADABLE, "config.offload")
    return {name: name in parts for name in OFFLOADABLE}


def is_on_host(x: Array) -> bool:
    """Returns whether `x` is in the host's memory."""
    # By its type: while tracing there is no array, and so no sharding, to ask.
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_host(x: Array) -> Array:
    """Moves `x` to the host's memory, within jit."""
    return jax.device_put(x, jax.memory.Space.Host)


def on_device(tree: PyTree) -> PyTree:
    """Brings the leaves of `tree` that are in the host's memory to the device's, in jit or out."""

    def bring(x: Array) -> Array:
        return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x

    return jax.tree.map(bring, tree)


def _in_host_memory(places: PyTree, shapes: PyTree, mesh: Mesh) -> PyTree:
    """Returns shardings in pinned host memory.

    Scalars, which control the step (optax's counters), stay on the device.
    """
    device = mesh.devices.flat[0]
    if HOST_MEMORY not in [memory.kind for memory in device.addressable_memories()]:
        message = f"{device.device_kind} has no {HOST_MEMORY} memory; leave it out"
        raise UserError(f"config.offload: {message}")
    return jax.tree.map(
        lambda place, x: place.with_memory_kind(HOST_MEMORY) if x.ndim else place, places, shapes
    )


def abstract_state(
    task: Task,
    optimizer: Optimizer,
    seed: int,
    mesh: Mesh,
    rules: sharding.Rules,
    offload: str = "",
) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings; nothing is allocated.

    Args:
        offload: config.offload.

    Raises:
        UserError: the mesh's devices have no such memory, or a large model is not split
            (`sharding.check_split`).
    """
    to_host = offloaded(offload)
    shapes = jax.eval_shape(lambda: _create(task, optimizer, seed))
    # The average lies as the parameters do: both feed one elementwise update.
    places = sharding.param_shardings(shapes.params, rules, mesh)
    everywhere = cast(Any, sharding.replicated(mesh))
    placed = TrainState(
        step=everywhere,
        params=places,
        ema_params=places,
        opt_state=sharding.inherit_shardings(shapes.opt_state, shapes.params, places, mesh),
        faults=Faults(everywhere, everywhere, everywhere),
    )
    for name, field in OFFLOADABLE.items():
        if to_host[name]:
            moved = _in_host_memory(getattr(placed, field), getattr(shapes, field), mesh)
            placed = placed.replace(**{field: moved})
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        placed,
    )
    sharding.check_split(state.params, mesh)
    return state


def shardings_of(template: TrainState) -> TrainState:
    """Returns the shardings of an abstract state."""
    return jax.tree.map(lambda x: x.sharding, template)


def init_state(
    task: Task, optimizer: Optimizer, seed: int, template: TrainState, init_from: str = ""
) -> TrainState:
    """Creates the state of step 0 straight in its shards: fresh, or from a model folder.

    Params and EMA both start from `init_from`. Raises UserError, before anything is created, if it
    is no model folder or its tensors are missing, of another shape or not the network's: a deeper
    network would otherwise be loaded in part.
    """
    tensors = _read(init_from, task, template) if init_from else None
    # With `out_shardings` each device computes its own slices only. A warm start makes this state,
    # too: it needs the optimiser's, and `load` takes dtypes and shardings from the parameters.
    make = jax.jit(lambda: _create(task, optimizer, seed), out_shardings=shardings_of(template))
    state = make()
    if tensors is None:
        return state

    def load(leaf: Array, tensor: Any) -> Array:
        value = np.asarray(tensor, leaf.dtype)
        # The callback hands every device of this host its slice; the whole stays in NumPy.
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    def load_all(into: Params) -> Params:  # twice: the state is donated
        return jax.tree.map(load, into, tensors)

    return state.replace(params=load_all(state.params), ema_params=load_all(state.ema_params))


def _read(init_from: str, task: Task, template: TrainState) -> Params:
    folder = model_names.resolve(init_from)
    tensors = model_folder.read_params(folder, task.stage)
    if task.optional_layer:
        flat: dict[Any, Any] = traverse_util.flatten_dict(tensors)
        expected: dict[Any, Any] = traverse_util.flatten_dict(template.params)
        for path, leaf in expected.items():
            if task.optional_layer in path:  # one of the path's parts
                flat.setdefault(path, np.zeros(leaf.shape, np.float32))
        tensors = traverse_util.unflatten_dict(flat)
    try:
        model_folder.check_params(tensors, template.params, f"init_from={folder}")
    except UserError as error:
        raise UserError(f"{error}: use the config it was trained with") from error
    return tensors
