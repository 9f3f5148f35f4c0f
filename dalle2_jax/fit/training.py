"""A stage's train step, compiled for a slice that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dalle2_jax import build, sharding
from dalle2_jax.errors import UserError
from dalle2_jax.fit import flops
from dalle2_jax.fit.chips import GIB, Slice, open_slice
from dalle2_jax.fit.report import DoesNotFit, Report, TooLarge, compile_twice, measure
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import HOST_MEMORY, TrainState, abstract_state
from dalle2_jax.train.step import FROZEN_RULES, make_train_step
from dalle2_jax.types import Batch, Params, PyTree, Task

MOST_WHOLE = 0.02  # of the parameters' bytes on every chip


def report(config: build.Config, topology: str, auto_batch: bool = False) -> Report:
    """The step that `config` (a complete one) would run on the slice `topology`.

    With `auto_batch` the largest batch that fits, in place of config.batch_size.

    Raises:
        TooLarge: it does not fit.
        UserError: a slice that does not exist, a batch or a mesh that does not divide.
    """
    where = open_slice(topology)
    mesh = sharding.make_mesh(config.mesh, where.devices)
    if auto_batch:
        return _largest(config, where, mesh)
    try:
        return _report(config, where, mesh)
    except DoesNotFit as error:
        raise TooLarge(_told(config, where, mesh, error)) from error


def _report(config: build.Config, where: Slice, mesh: Mesh) -> Report:
    sharding.check_batch_size(config.batch_size, mesh)
    task = build.task(config)
    build.check(config, task)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    template = abstract_state(
        task, optimizer, config.seed, mesh, config.sharding_rules, config.offload
    )
    _check_split(template.params, mesh)
    frozen = {
        name: sharding.placed(tree, FROZEN_RULES, mesh) for name, tree in task.frozen().items()
    }
    batch = build.abstract_batch(config, sharding.batch_sharding(mesh))

    def lower() -> Any:
        step = make_train_step(task, optimizer, config, template, mesh)
        return step.lower(template, frozen, batch)

    return measure(
        *compile_twice(lower),
        where,
        batch_size=config.batch_size,
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(template.params)),
        kinds=_bytes_by_kind(template, frozen, batch),
        analytic_flops=_analytic_flops(config) / where.chips,
        ideal_collective_bytes=_ideal_bytes(config, template.params, frozen, mesh),
        num_steps=config.num_steps,
    )


def _check_split(params: Params, mesh: Mesh) -> None:
    """UserError where too many weights lie whole on every chip, as no axis of them divides."""
    places = jax.tree.map(lambda x: x.sharding, params)
    whole = sharding.replicated_bytes_fraction(params, places)
    if mesh.shape["fsdp"] > 1 and whole > MOST_WHOLE:
        least = max(
            (x for x in sharding.flatten(params).items() if x[1].sharding.is_fully_replicated),
            key=lambda x: math.prod(x[1].shape),
        )
        raise UserError(
            f"{100 * whole:.0f} % of the parameters' bytes would lie whole on every chip, for "
            f"mesh.fsdp={mesh.shape['fsdp']} divides no axis of {least[0]} {least[1].shape}: give "
            "fewer, as in --config.mesh.data=4"
        )


def local_bytes(tree: PyTree) -> int:
    """What one device's own memory holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != HOST_MEMORY
    )


def _bytes_by_kind(template: TrainState, frozen: Params, batch: Batch) -> dict[str, float]:
    return {
        "params": local_bytes(template.params),
        "optimiser": local_bytes(template.opt_state),
        "EMA": local_bytes(template.ema_params),
        "frozen": local_bytes(frozen),
        "batch": local_bytes(batch),
    }


def _analytic_flops(config: build.Config) -> int:
    """Forward and backward pass over the global batch, on one device, nothing computed twice."""
    plain = build.without_remat(config)
    task: Task = build.task(plain)

    def gradient(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Any:
        return jax.value_and_grad(task.loss, has_aux=True)(params, frozen, batch, key, True)

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(task.init, key)
    return flops.of_function(gradient, params, task.frozen(), build.abstract_batch(config), key)


def _ideal_bytes(config: build.Config, params: Params, frozen: Params, mesh: Mesh) -> float:
    """What a chip must send in a step: each split weight is gathered for either pass and its
    gradient reduce-scattered, the rest all-reduced; frozen weights are gathered once."""
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
    shards = sharding.batch_shards(mesh)
    cures = []
    if config.batch_size > shards:
        smaller = max(config.batch_size // 2 // shards, 1) * shards
        cures.append(f"--config.batch_size={smaller} (--auto_batch finds the largest)")
    if build.without_remat(config) == config:
        cures.append("a network that computes anew what it needs twice (its remat='full')")
    if mesh.shape["data"] > 1:
        cures.append("weights split over all chips (--config.mesh.data=1 --config.mesh.fsdp=-1)")
    cures.append("more chips")
    return (
        f"batch_size={config.batch_size} does not fit {where.name}: {error}, "
        f"{(error.needed - error.available) / GIB:.2f} GiB too much a chip. It would help: "
        + "; ".join(cures)
    )


def _largest(config: build.Config, where: Slice, mesh: Mesh) -> Report:
    """By what one and two examples a shard need, as memory grows with the batch evenly."""
    shards = sharding.batch_shards(mesh)

    def attempt(rows: int) -> Report:
        tried = config.copy_and_resolve_references()
        with tried.unlocked():
            tried.batch_size = rows * shards
        logging.info("compiling with batch_size=%d", tried.batch_size)
        return _report(tried, where, mesh)

    return largest(attempt, where.chip.hbm, lambda e: TooLarge(_told(config, where, mesh, e)))


def largest(
    attempt: Callable[[int], Report], hbm: float, too_large: Callable[[DoesNotFit], UserError]
) -> Report:
    """The report of the most rows that `attempt` fits. Every attempt compiles: there are few."""
    try:
        best, rows = attempt(1), 1
    except DoesNotFit as error:
        raise too_large(error) from error
    fails = math.inf
    sizes = {1: best.memory["total"]}
    while rows + 1 < fails:
        if len(sizes) == 1:
            guess = 2 * rows if fails == math.inf else (rows + fails) // 2
        else:
            (r0, m0), (r1, m1) = sorted(sizes.items())[-2:]
            slope = max((m1 - m0) / (r1 - r0), 1.0)
            guess = rows + max(int((hbm - m1) / slope), 1)
            guess = min(guess, 64 * rows if fails == math.inf else (rows + fails) // 2)
        guess = int(min(max(guess, rows + 1), fails - 1))
        try:
            best, rows = attempt(guess), guess
            sizes[guess] = best.memory["total"]
        except DoesNotFit:
            fails = guess
    return best
