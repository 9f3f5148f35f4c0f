"""A stage's train step, compiled for a slice that is not there."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax import build
from dalle2_jax.aot import flops
from dalle2_jax.aot.chips import GIB, Slice, open_slice, parse, prepare
from dalle2_jax.aot.largest import largest
from dalle2_jax.aot.report import DoesNotFit, Report, TooLarge, compile_twice, measure
from dalle2_jax.parallel import sharding
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import HOST_MEMORY, TrainState, abstract_state
from dalle2_jax.train.step import FROZEN_RULES, make_train_step
from dalle2_jax.types import Batch, Params, PyTree, Task


def report(
    config: build.Config, topology: str, auto_batch: bool = False, thorough: bool = False
) -> Report:
    """The step that `config` (a complete one) would run on the slice `topology`.

    With `auto_batch` the largest batch that fits, in place of config.batch_size; `thorough` as for
    `compile_twice`.

    Raises:
        TooLarge: it does not fit.
        UserError: a slice that does not exist, a batch or a mesh that does not divide.
    """
    parse(topology)
    prepare()
    build.check(config, build.task(config))  # first, as opening a slice takes many seconds
    where = open_slice(topology)
    mesh = sharding.make_mesh(config.mesh, where.devices)
    tried = config.copy_and_resolve_references()

    def attempt(batch_size: int) -> Report:
        with tried.unlocked():
            tried.batch_size = batch_size
        try:
            return _report(tried, where, mesh, thorough)
        except DoesNotFit as error:
            raise TooLarge(_told(tried, where, mesh, error), error) from error

    if auto_batch:
        return largest(attempt, _least_rows(config, mesh), where.chip.hbm)
    return attempt(config.batch_size)


def _report(config: build.Config, where: Slice, mesh: Mesh, thorough: bool) -> Report:
    sharding.check_batch_size(config.batch_size, mesh)
    task = build.task(config)
    optimizer = make_optimizer(config.optimizer, config.num_steps, task.trainable)
    template = abstract_state(
        task, optimizer, config.seed, mesh, config.sharding_rules, config.offload
    )
    frozen = {
        name: sharding.with_shardings(tree, FROZEN_RULES, mesh)
        for name, tree in task.frozen().items()
    }
    batch = build.abstract_batch(config, sharding.batch_sharding(mesh))

    analytic, padding = count(config)

    def lower() -> Any:
        step = make_train_step(task, optimizer, config, template, mesh)
        return step.lower(template, frozen, batch)

    return measure(
        *compile_twice(lower, thorough),
        where,
        batch_size=config.batch_size,
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(template.params)),
        kinds=_bytes_by_kind(template, frozen, batch),
        analytic_flops=analytic / where.chips,
        padding=padding,
        ideal_collective_bytes=_ideal_bytes(config, template.params, frozen, mesh),
        num_steps=config.num_steps,
        from_host=local_bytes(template, on_host=True),
        thorough=thorough,
    )


def local_bytes(tree: PyTree, on_host: bool = False) -> int:
    """Returns the bytes of ShapeDtypeStructs with shardings in one device's memory.

    What waits for the device in the host's memory counts as well.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind == HOST_MEMORY) == on_host
    )


def _bytes_by_kind(template: TrainState, frozen: Params, batch: Batch) -> dict[str, float]:
    return {
        "params": local_bytes(template.params),
        "optimiser": local_bytes(template.opt_state),
        "EMA": local_bytes(template.ema_params),
        "frozen": local_bytes(frozen),
        "batch": local_bytes(batch),
    }


def count(config: build.Config) -> tuple[int, float]:
    """(FLOPs of forward and backward pass over the global batch, nothing computed twice; what
    padding would add to them)."""
    task: Task = build.task(build.without_remat(config))

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Any:
        return task.loss(params, frozen, batch, key, True)

    key = jax.eval_shape(lambda: jax.random.key(0))
    args = jax.eval_shape(task.init, key), task.frozen(), build.abstract_batch(config), key
    gradient = jax.value_and_grad(loss, has_aux=True)
    return flops.of_function(gradient, *args), flops.padding(loss, *args)


def _ideal_bytes(config: build.Config, params: Params, frozen: Params, mesh: Mesh) -> float:
    """Returns the bytes that a chip must send in a step.

    Every split weight is gathered for both passes and its gradient reduce-scattered; other
    gradients are all-reduced; frozen weights are gathered once. What a "tensor" axis sends of
    activations comes on top.
    """
    size = jax.numpy.dtype(config.model.get("dtype", "float32")).itemsize
    f, d = mesh.shape["fsdp"], mesh.shape["data"]

    def sent(x: jax.ShapeDtypeStruct, passes: int) -> float:
        axes: Any = x.sharding
        parts = mesh.shape["tensor"] if "tensor" in axes.spec else 1
        of_tensor = math.prod(x.shape) * size / parts
        if "fsdp" not in axes.spec:
            return 2 * of_tensor * (f * d - 1) / (f * d) if passes > 1 else 0.0
        across = 2 * of_tensor / f * (d - 1) / d if passes > 1 else 0.0
        return passes * of_tensor * (f - 1) / f + across

    trained = sum(sent(x, 3) for x in jax.tree.leaves(params))
    return trained + sum(sent(x, 1) for x in jax.tree.leaves(frozen))


def _told(config: build.Config, where: Slice, mesh: Mesh, error: DoesNotFit) -> str:
    cures, least = [], _least_rows(config, mesh)
    task = build.task(config)
    state = abstract_state(
        task,
        make_optimizer(config.optimizer, config.num_steps, task.trainable),
        config.seed,
        mesh,
        config.sharding_rules,
        config.offload,
    )
    held = local_bytes(state)  # whatever the batch; the rest grows with it
    share = (error.available - held) / max(error.needed - held, 1)
    smaller = int(config.batch_size * min(share, 1) * 0.9) // least * least
    if smaller > 0:
        cures.append(f"--config.batch_size={smaller} (--auto_batch finds the largest)")
    lighter = [f"--config.{name}.remat=full" for name in build.not_rematerialised(config)]
    if lighter:
        cures.append(f"to compute anew what is needed twice ({' '.join(lighter)})")
    if not config.offload:
        cures.append("--config.offload=ema,optimizer")
    if mesh.shape["data"] > 1:
        cures.append("weights split over all chips (--config.mesh.data=1 --config.mesh.fsdp=-1)")
    cures.append("more chips")
    return (
        f"batch_size={config.batch_size} does not fit {where.name}: {error}, "
        f"{(error.needed - error.available) / GIB:.2f} GiB too much a chip. It would help: "
        + "; ".join(cures)
    )


def _least_rows(config: build.Config, mesh: Mesh) -> int:
    """Returns the smallest global batch, of which all others are multiples.

    SAM's replicas lie whole on a shard; a contrastive loss needs two pairs.
    """
    shards = sharding.num_batch_shards(mesh)
    if config.task.get("sam_rho"):
        return shards * config.task.sam_replica_batch
    return max(shards, 2) if config.task.name == "clip" else shards
