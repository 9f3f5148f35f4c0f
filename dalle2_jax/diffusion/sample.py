"""The sampling loop that all solvers share.

Noise belongs to an example, not to a batch: that of step t of example i is a function of
fold_in(keys[i], t) alone, so that an image is the same sampled alone, in any batch, and on any
number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion.gaussian import Clip, to_prediction
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.diffusion.schedules import Schedule
from dalle2_jax.types import Array, Denoiser, Prediction, PyTree, Solver

_INIT = 2**31 - 1  # folded in for x_T: no step's index


def denoiser_from(
    schedule: Schedule,
    apply: Apply,
    kind: str = "eps",
    clip: Clip = None,
    learned_variance: bool = False,
) -> Denoiser:
    """Returns the network as the solvers see it.

    Args:
        schedule: the sampled schedule, respaced or not. Its `timesteps` give the network the time
            that it was trained with.
        apply: (x_t [b, ...], t [b] int32 of the training schedule) -> raw output.
        kind, clip, learned_variance: see `gaussian.to_prediction`.
    """
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)

    def denoiser(x_t: Array, t: Array) -> Prediction:
        return to_prediction(
            schedule, kind, apply(x_t, timesteps[t]), x_t, t, clip, learned_variance
        )

    return denoiser


def init_noise(keys: Array, shape: Sequence[int]) -> Array:
    """x_T float32 [b, *shape], standard normal, from typed keys [b]; `shape` is one example's.

    The same keys may be handed to `sample`: its noise is folded apart from this.
    """
    return _noise(keys, _INIT, tuple(shape))


def step_noise(keys: Array, t: Array | int, shape: Sequence[int]) -> Array:
    """The noise of step t, float32 [b, *shape]."""
    return _noise(keys, t, tuple(shape))


def _noise(keys: Array, index: Array | int, shape: tuple[int, ...]) -> Array:
    # Each row from its own key: from one key for all, a row's noise would depend on its batch.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


class State(NamedTuple):
    """The carry of the sampling loop."""

    x_t: Array  # b ...
    memory: PyTree  # the solver's
    x_0: Array  # b ..., as last predicted


def begin(solver: Solver, x_T: Array) -> State:
    """Returns the state before the first step; x_T [b, ...]."""
    # float32 throughout: many small steps are added up, whatever the network computes in.
    x_T = x_T.astype(jnp.float32)
    return State(x_T, solver.init(x_T), jnp.zeros_like(x_T))


def take_step(
    solver: Solver,
    denoiser: Denoiser,
    state: State,
    t: Array,
    keys: Array | None,
    noise: Array | None = None,
) -> State:
    """Takes one step, x_t -> x_{t-1}; `noise` [b, ...] in place of that of `keys` [b]."""
    # Made for deterministic solvers too; the compiler drops what a step does not read.
    if noise is None:
        assert keys is not None, "sampling takes keys or noise"
        noise = step_noise(keys, t, state.x_t.shape[1:])
    # A solver returns no prediction, yet progress shows one. So the denoiser it gets takes notes
    # while the step is traced.
    predictions = []

    def remembering(x_t: Array, t: Array) -> Prediction:
        predictions.append(denoiser(x_t, t))
        return predictions[-1]

    x_t, memory = solver.step(remembering, state.x_t, t, noise, state.memory)
    # The first prediction of the step: later ones may have been traced inside a branch.
    return State(x_t, memory, predictions[0].x_0)


def advance(
    solver: Solver,
    denoiser: Denoiser,
    state: State,
    first: Array | int,
    count: Array | int,
    keys: Array | None,
    noise: Array | None = None,
) -> State:
    """Takes `count` steps, those at t = first, first - 1, ...

    Both may be traced, so one program serves any number of steps. Jitted over a few steps at a
    time, it lets the host report progress between calls without a callback in the program, which
    would keep the program out of JAX's persistent cache.

    Args:
        noise: [count, b, ...], in the order of sampling; in place of that of `keys` [b].
    """

    def body(i: Array, state: State) -> State:
        return take_step(
            solver, denoiser, state, first - i, keys, None if noise is None else noise[i]
        )

    # A traced count makes this a while loop, which has no reverse derivative. Nothing needs one.
    return jax.lax.fori_loop(0, count, body, state)


def sample(
    solver: Solver,
    denoiser: Denoiser,
    x_T: Array,
    keys: Array | None,
    steps: Schedule | int,
    *,
    noise: Array | None = None,
) -> Array:
    """x_0 [b, ...] from x_T [b, ...]: every step of the schedule, T-1 down to 0.

    Args:
        solver: one of `solvers`, made for the schedule that is sampled.
        denoiser: (x_t, t [b]) -> Prediction, see `denoiser_from`.
        x_T: float32, see `init_noise`.
        keys: typed keys [b], one an example; unused where `noise` is given.
        steps: the sampled schedule, or its length.
        noise: [T, b, ...], noise[i] for step T-1-i in the order of sampling; instead of keys.
    """
    total = steps.num_timesteps if isinstance(steps, Schedule) else steps
    return advance(solver, denoiser, begin(solver, x_T), total - 1, total, keys, noise).x_t
