"""The jitted steps of training, evaluation and previews; and placing a batch on the devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.parallel.fsdp import gathering, network_trees
from dalle2_jax.train.optimizer import Optimizer, ema_update
from dalle2_jax.train.state import Faults, TrainState, is_on_host, on_device, shardings_of, to_host
from dalle2_jax.types import Array, Batch, Metrics, Params, Task

TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
# Groups in which offloaded parts of the state are updated, so that about a sixteenth of them is on
# the device at a time. More groups take less memory, but each is a branch with an update of its own
# in the program.
TURNS = 16
FROZEN_RULES = ((".*", "fsdp"),)


@contextlib.contextmanager
def gathering_layers(
    mesh: Mesh, rules: sharding.Rules, params: Params, frozen: Params
) -> Iterator[None]:
    """Makes the networks' layers gather their weights while tracing, see `parallel.fsdp`.

    `jax.sharding.get_abstract_mesh` finds the mesh within, for a loss that maps over shards itself.
    The shardings of jit's arguments are not visible while tracing, so the rules give them here.
    """
    # One tree a network: paths are matched from a network's own root, as Flax knows them.
    trees = [*network_trees(sharding.with_shardings(params, rules, mesh))]
    trees += [sharding.with_shardings(tree, FROZEN_RULES, mesh) for tree in frozen.values()]
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        gathering(mesh, *trees),
    ):
        yield


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows of a batch, NumPy [rows, ...] -> global arrays [b, ...] over the mesh."""
    place, shards = sharding.batch_sharding(mesh), sharding.num_batch_shards(mesh)
    held = sharding.local_shards(mesh)

    def spread(x: np.ndarray) -> Array:
        size = len(x) // len(held)  # rows of a shard
        parts = dict(zip(held, x.reshape(len(held), size, *x.shape[1:]), strict=True))
        shape = (shards * size, *x.shape[1:])

        # `index` holds the global slices of one device; its first row says which shard that is.
        def part(index: Any) -> np.ndarray:
            return parts[index[0].indices(shape[0])[0] // size]

        return jax.make_array_from_callback(shape, place, part)

    return {name: spread(np.asarray(x)) for name, x in local.items()}


def place_frozen(frozen: Params, mesh: Mesh) -> Params:
    """Places frozen parameters on the devices, split over "fsdp" where an axis divides.

    Raises UserError if there are only shapes.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(frozen)):
        raise UserError(
            "config.clip_from names a config, which has no weights (it serves --topology alone): "
            "train that CLIP first and name its model folder"
        )
    if not jax.tree.leaves(frozen):
        return frozen
    return jax.device_put(frozen, sharding.param_shardings(frozen, FROZEN_RULES, mesh))


def keep_if_good(old: TrainState, new: TrainState, good: Array) -> TrainState:
    """Returns `new`, or `old` with its counters moved if the gradient was not good."""
    # A choice leaf by leaf is fused into the update's own loops, which then work in place. A
    # lax.cond over whole states would keep the old and the new one in memory.
    chosen = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    faults = Faults(
        skipped=old.faults.skipped + ~good,
        in_a_row=jnp.where(good, 0, old.faults.in_a_row + 1),
        passed_over=old.faults.passed_over,
    )
    return chosen.replace(step=old.step + 1, faults=faults)


def in_turns(
    update: Callable[[TrainState], TrainState], state: TrainState, good: Array
) -> TrainState:
    """Applies `update` to the state; what is offloaded comes to the device in turns.

    `update(state)` must compute each parameter's part of the state (weights, moments, average) from
    that part alone. Parts in the host's memory would, all at once, take the memory that offloading
    saves:

        for each group of parameters (about TURNS of one size):
            if the step is good:              a branch, or XLA would fetch all groups at once
                fetch the group's leaves from the host
                update them
                send them back                before the next group is fetched
    """
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    leaves = [x for _, x in paths_and_leaves]
    waiting = {i for i, x in enumerate(leaves) if is_on_host(x)}
    # The whole update is traced, but only the leaves that no turn replaces below are used (counters
    # and parameters that are on the device in full). XLA drops the rest as dead code.
    new = jax.tree.leaves(update(state))
    for turn in _turns(paths_and_leaves, state.params, waiting):
        # `turn=turn` binds the present group: a closure would see the last one of the loop.
        def change(group: list[Array], turn: list[int] = turn) -> tuple[list[Array], Array]:
            now = dict(enumerate(leaves)) | dict(zip(turn, group, strict=True))
            # Again the whole update, of which the branch returns this group's leaves alone.
            updated = jax.tree.leaves(update(jax.tree.unflatten(tree, now.values())))
            # A number that exists only when all leaves of the group have been computed.
            first = jnp.stack([updated[i].ravel()[0].astype(jnp.float32) for i in turn]).sum()
            return [to_host(updated[i]) if i in waiting else updated[i] for i in turn], first

        def keep(group: list[Array]) -> tuple[list[Array], Array]:
            return group, jnp.float32(0)

        done, first = jax.lax.cond(good, change, keep, [leaves[i] for i in turn])
        # Unchanged in value, even if `first` is NaN. The data dependency keeps XLA from fetching
        # the next group from host memory before this one has gone back.
        good &= (first == first) | good
        for i, leaf in zip(turn, done, strict=True):
            new[i] = leaf
    return jax.tree.unflatten(tree, new)


def _turns(
    paths_and_leaves: Sequence[Any], params: Params, waiting: Container[int]
) -> list[list[int]]:
    """Groups the state's leaves, by index, for `in_turns`.

    Only parameters of which a leaf is `waiting` on the host are grouped: about TURNS groups of one
    size, the leaves of a parameter together.
    """
    names = sharding.flatten(params)
    owned: dict[str, list[int]] = {name: [] for name in names}
    for i, (path, leaf) in enumerate(paths_and_leaves):
        # A leaf belongs to the parameter that its path ends in, as `0/mu/blocks/kernel` in
        # `blocks/kernel`; the longest ending comes first.
        ends = (sharding.path_name(path[start:]) for start in range(len(path)))
        name = next((n for n in ends if n in names and names[n].shape == leaf.shape), None)
        if name:
            owned[name].append(i)
    owned = {name: places for name, places in owned.items() if any(i in waiting for i in places)}
    # Filled in the order of the tree; a group is closed once it has its share of the elements.
    total = sum(names[name].size for name in owned)
    turns: list[list[int]] = []
    size = total
    for name, places in owned.items():
        if size * TURNS >= total:
            turns.append([])
            size = 0
        turns[-1] += places
        size += names[name].size
    return turns


def make_train_step(
    task: Task, optimizer: Optimizer, config: Any, template: TrainState, mesh: Mesh
) -> TrainStep:
    """Returns the jitted (state, frozen, batch) -> (state, metrics); it donates the given state.

    metrics are those of the task, and loss, grad_norm (before clipping), param_norm, learning_rate
    and skipped, all float32 scalars. If skipped is 1, the loss or gradient was not finite, or the
    gradient was above config.max_grad_norm, and only the counters changed.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        # By the position, not the step, so that a batch keeps its noise after a rollback, too.
        key = jax.random.fold_in(jax.random.key(config.seed), state.position)
        grad = jax.value_and_grad(task.loss, has_aux=True)
        with gathering_layers(mesh, config.sharding_rules, state.params, frozen):
            (loss, metrics), grads = grad(state.params, frozen, batch, key, True)
        # Before the norm, which is to tell of what is trained, and before clipping by it.
        grads = optimizer.without_untrained(grads)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if config.max_grad_norm:
            good &= grad_norm <= config.max_grad_norm

        def update(state: TrainState) -> TrainState:
            state = on_device(state)
            updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            ema_params = ema_update(
                state.ema_params,
                params,
                config.ema_decay,
                config.ema_warmup,
                state.good_steps + 1,  # this step, if it turns out good, included
                optimizer,
            )
            new = state.replace(params=params, ema_params=ema_params, opt_state=opt_state)
            return keep_if_good(state, new, good)

        new = in_turns(update, state, good)
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            # Of the new parameters: it is not finite if this very update broke them (`recovery`).
            "param_norm": optax.tree.norm(new.params),
            "learning_rate": optimizer.schedule(optimizer.num_updates(state.good_steps)),
            "skipped": jnp.where(good, 0.0, 1.0),
        }
        return new, metrics

    places = shardings_of(template)
    return jax.jit(
        train_step,
        # None: frozen parameters come as `place_frozen` has placed them. The state leaves with the
        # shardings that it came with: it is the next step's argument, and only an array of the same
        # sharding can take over donated memory.
        in_shardings=(places, None, sharding.batch_sharding(mesh)),
        out_shardings=(places, sharding.replicated(mesh)),
        donate_argnums=0,  # the new state takes the old one's memory: there may be no room for two
    )


def make_eval_step(
    task: Task, rules: sharding.Rules, mesh: Mesh
) -> Callable[[Params, Params, Batch, Array], Metrics]:
    """Returns (params, frozen, batch, key) -> the task's metrics and loss, with train=False."""

    def eval_step(params: Params, frozen: Params, batch: Batch, key: Array) -> Metrics:
        params = on_device(params)
        with gathering_layers(mesh, rules, params, frozen):
            loss, metrics = task.loss(params, frozen, batch, key, False)
        return {**metrics, "loss": loss}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def make_preview(
    task: Task, rules: sharding.Rules, mesh: Mesh, rows: int
) -> Callable[[Params, Params, Batch, Array], tuple[dict[str, Array], Array | None]]:
    """Returns (params, frozen, batch, key) -> the task's images of the first `rows`, and their
    tokens.

    The tokens are returned because another host may have read them.
    """

    def preview(params: Params, frozen: Params, batch: Batch, key: Array) -> Any:
        params = on_device(params)
        with gathering_layers(mesh, rules, params, frozen):
            shown = task.preview(params, frozen, batch, key, rows)
        return shown, batch["tokens"][:rows] if "tokens" in batch else None

    return jax.jit(preview, out_shardings=sharding.replicated(mesh))


def make_measure(
    task: Task, rules: sharding.Rules, mesh: Mesh
) -> Callable[[Params, Params, Batch, Array], dict[str, Array]] | None:
    """Returns (params, frozen, batch, key) -> measurements of the task's network, or None.

    None stands for a task that measures nothing.
    """
    # Not in the protocol `Task`, since only the diffusion prior measures something.
    task_measure = getattr(task, "measure", None)
    if task_measure is None:
        return None

    def measure(params: Params, frozen: Params, batch: Batch, key: Array) -> dict[str, Array]:
        params = on_device(params)
        with gathering_layers(mesh, rules, params, frozen):
            return task_measure(params, frozen, batch, key)

    return jax.jit(measure, out_shardings=sharding.replicated(mesh))
