"""The best variances of the reverse process, from one number a time (Analytic-DPM, 2201.06503).

    sigma_t^2 = lambda_t^2 + c_t^2 (1 - E|eps|^2 / d)                                        (1)
    c_t       = sqrt((1 - abar_t) / a_t) - sqrt(1 - abar_{t-1} - lambda_t^2)                 (2)

where a_t = abar_t / abar_{t-1}, lambda_t^2 is DDPM's posterior variance beta~, and E|eps|^2 / d the
mean square of the noise that the network predicts over q(x_t). That is theorem 1 told by eps, for
which the score is -eps / sqrt(1 - abar). As the mean square lies within 0 and 1 for a network that
predicts the mean, and is held there, (1) keeps the bounds of theorem 2.

Under a network's own error the noise that it predicts has a mean square of less than 1: where x_0
is quite uncertain (many x_0 go with one x_t) (1) is more than beta~, and draws what DDPM with few
steps would miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.gaussian import q_sample, to_prediction
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.schedules import Schedule
from dalle2_jax.types import Array

KNOTS = 33  # times at which the mean square is measured: it changes slowly between


def knots(num_timesteps: int, count: int = KNOTS) -> np.ndarray:
    """Times of the training schedule, int [count], from the first to the last."""
    return np.round(np.linspace(0, num_timesteps - 1, count)).astype(int)


def measure(
    process: Process, apply: Callable[[Array, Array], Array], x_0: Array, key: Array
) -> Array:
    """E|eps|^2 / d at `knots`, float32 [KNOTS], over examples x_0 [b, ...]; `apply` takes (x_t, t)
    to the network's raw output."""
    schedule = process.training_schedule()

    def at(t: Array, key: Array) -> Array:
        times = jnp.full(x_0.shape[:1], t, jnp.int32)
        x_t = q_sample(schedule, x_0, times, jax.random.normal(key, x_0.shape))
        told = process.prediction, apply(x_t, times), x_t, times, None, process.learned_variance
        return jnp.mean(jnp.square(to_prediction(schedule, *told).eps))

    times = jnp.asarray(knots(process.num_timesteps), jnp.int32)
    return jax.lax.map(lambda pair: at(*pair), (times, jax.random.split(key, len(times))))


def variances(schedule: Schedule, num_timesteps: int, eps_square: Sequence[float]) -> np.ndarray:
    """(1) for each step of a schedule, respaced or not, float64 [T]; `eps_square` as `measure` gave
    it for the training schedule of `num_timesteps`."""
    at = np.interp(schedule.timesteps, knots(num_timesteps, len(eps_square)), eps_square)
    abar, prev, lambda_2 = schedule.alpha_bar, schedule.alpha_bar_prev, schedule.posterior_variance
    c = np.sqrt((1 - abar) / schedule.alpha) - np.sqrt(np.maximum(1 - prev - lambda_2, 0))
    return lambda_2 + c**2 * (1 - np.clip(at, 0, 1))
