"""The optimiser of a config, from optax: AdamW, schedule, clipping, accumulation, EMA.

A *step* of the trainer is one batch. With `accumulate` = k an *update* happens every k-th step on
the mean gradient of k batches; schedules, warm-up and the EMA count updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import UserError
from dalle2_jax.parallel.sharding import path_name
from dalle2_jax.types import Array, Params, PyTree

# Of the first moments. The second are never less than float32: their small steps would be lost.
MU_DTYPES = ("float32", "bfloat16")


Tree = TypeVar("Tree")
Trainable = Callable[[str], bool]
"""Says of a parameter, by its path as `blocks/attn/kernel`, whether it is trained."""


class Optimizer(NamedTuple):
    """The transformation that turns a gradient into an update, and its learning-rate schedule."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    """update count -> learning rate"""
    accumulate: int
    """batches an update"""
    trainable: Trainable
    """of `Task.trainable`"""

    def without_untrained(self, grads: Tree) -> Tree:
        """Returns the gradients with zeros for the parameters that are not trained.

        Their Adam moments then stay zero and, as weight decay leaves them out too, so does their
        update: they keep their value to the bit, in the parameters and in the moving average.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, g: g if self.trainable(path_name(path)) else jnp.zeros_like(g), grads
        )

    def num_updates(self, step: Array | int) -> Array | int:
        """Updates made after `step` batches."""
        return step // self.accumulate


def decay_mask(params: Params, trainable: Trainable = lambda path: True) -> PyTree:
    """Returns True where decoupled weight decay applies: trained matrices and kernels.

    Biases, norm scales and other vectors are left alone, and so are parameters named `bias` or
    `scale` of any rank (a stack of blocks gives them a leading axis).
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        axes = sum(size > 1 for size in leaf.shape)  # a vector may have leading axes of one
        return axes >= 2 and name not in ("bias", "scale") and trainable(path_name(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_schedule(settings: Mapping[str, Any], num_updates: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps` updates, then constant or a cosine down to 0."""
    peak, warmup = float(settings["learning_rate"]), int(settings["warmup_steps"])
    if settings["schedule"] == "constant":
        after = optax.constant_schedule(peak)
    elif settings["schedule"] == "cosine":
        after = optax.cosine_decay_schedule(peak, max(num_updates - warmup, 1))
    else:
        raise UserError(
            f"config.optimizer.schedule={settings['schedule']!r} is unknown; "
            "use 'constant' or 'cosine'"
        )
    if not warmup:
        return after
    # the first update already moves: (n + 1) / (warmup + 1) of the peak
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    settings: Mapping[str, Any],
    num_steps: int,
    trainable: Trainable = lambda path: True,
) -> Optimizer:
    """Returns the optimiser of a config.

    Args:
        settings: config.optimizer.
        num_steps: batches of the whole run.
        trainable: see `Task.trainable`.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    accumulate = int(settings["accumulate"])
    if accumulate < 1:
        raise UserError(f"config.optimizer.accumulate={accumulate} must be 1 or more")
    if settings["mu_dtype"] not in MU_DTYPES:
        raise UserError(
            f"config.optimizer.mu_dtype={settings['mu_dtype']!r} is unknown; use one of {MU_DTYPES}"
        )
    schedule = make_schedule(settings, num_steps // accumulate)
    # In this order: Adam sees the clipped gradient, and decay is not clipped.
    parts = []
    if settings["clip_norm"]:
        parts.append(optax.clip_by_global_norm(settings["clip_norm"]))
    parts.append(
        optax.adamw(
            schedule,
            b1=settings["b1"],
            b2=settings["b2"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            mask=functools.partial(decay_mask, trainable=trainable),
            mu_dtype=settings["mu_dtype"],
        )
    )
    tx = optax.chain(*parts)
    # Outermost, so that the mean gradient is clipped rather than those of the batches.
    if accumulate > 1:
        tx = optax.MultiSteps(tx, accumulate).gradient_transformation()
    return Optimizer(tx, schedule, accumulate, trainable)


def ema_update(
    ema_params: Params,
    params: Params,
    decay: float,
    warmup: bool,
    step: Array,
    opt: Optimizer,
) -> Params:
    """The moving average after `step` batches: unchanged where this batch made no update.

    With `warmup` the n-th update decays by min(decay, (1 + n) / (10 + n)), so that a short run's
    average does not remember the random start.
    """
    n = jnp.asarray(opt.num_updates(step), jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.float32(decay)
    updated = step % opt.accumulate == 0
    # In this form rounding moves no parameter that does not change.
    return jax.tree.map(
        lambda old, new: jnp.where(updated, new + rate * (old - new), old), ema_params, params
    )
