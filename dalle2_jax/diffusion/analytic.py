"""The best variances of the reverse process, from one number a time (Analytic-DPM, 2201.06503).

    sigma_t^2 = lambda_t^2 + c_t^2 v_t                                                       (1)
    c_t       = sqrt(abar_{t-1}) - sqrt((1 - abar_{t-1} - lambda_t^2) abar_t / (1 - abar_t))   (2)
    lambda_t  = eta sqrt(beta~_t): 1 is DDPM, 0 is DDIM                                      (3)
    v_t       = E |x_0 - x_0_pred|^2 / d = (1 - abar_t) / abar_t E |eps - eps_pred|^2 / d    (4)
    0 <= v_t <= min((1 - abar_t) / abar_t, E |x_0|^2 / d)                                    (5)

(1) is the paper's theorem 1, its factors regrouped so that no large one is left: c_t is what x_0
weighs in the mean of x_{t-1}. There v_t holds 1 - E |eps_pred|^2 / d (their 1 - betabar Gamma) for
E |eps - eps_pred|^2 / d. Both are one number where the network predicts the mean of eps, for then
E <eps, eps_pred> = E |eps_pred|^2. Where it does not quite, (4) still gives the best variance
(2206.07309, by the same authors), is never negative, and needs few samples. Theirs is
the small difference of two numbers near 1, multiplied by 1 / abar_T, some 10^8: the smallest error
of a network outweighs it. (5) is theorem 2, whose [a, b] for bounded data is E |x_0|^2 / d here.

The last step adds no noise (the paper's appendix).

v_t is a function of abar_t alone: measured over the training schedule it serves all respaced ones.
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

KNOTS = 33


def knots(num_timesteps: int) -> np.ndarray:
    """Returns the times at which v_t is measured, int [KNOTS], over the training schedule.

    They are closer where there is little noise, since v_t changes most there.
    """
    return np.round((num_timesteps - 1) * np.linspace(0, 1, KNOTS) ** 2).astype(int)


def measure(
    process: Process, apply: Callable[[Array, Array], Array], x_0: Array, key: Array
) -> Array:
    """Measures v_t of (4) at `knots`, float32 [KNOTS], bounded by the mean square of x_0.

    Args:
        apply: (x_t, t) -> the network's raw output.
        x_0: examples [b, ...].
    """
    schedule = process.training_schedule()

    def at(t: Array, key: Array) -> Array:
        times = jnp.full(x_0.shape[:1], t, jnp.int32)
        x_t = q_sample(schedule, x_0, times, jax.random.normal(key, x_0.shape))
        # Without a clip (None): the error of the network itself.
        args = process.prediction, apply(x_t, times), x_t, times, None, process.learned_variance
        return jnp.mean(jnp.square(to_prediction(schedule, *args).x_0 - x_0))

    times = jnp.asarray(knots(process.num_timesteps), jnp.int32)
    # A loop, not vmap: one batch in memory at a time.
    errors = jax.lax.map(lambda pair: at(*pair), (times, jax.random.split(key, len(times))))
    # (5): predicting 0 would already reach the mean square. The other bound needs abar, see
    # `variances`.
    return jnp.minimum(errors, jnp.mean(jnp.square(x_0)))


def variances(
    schedule: Schedule, num_timesteps: int, x_0_error: Sequence[float], eta: float = 1.0
) -> np.ndarray:
    """sigma_t^2 of (1) for each step of a schedule, respaced or not, float64 [T].

    Args:
        schedule: what is sampled.
        num_timesteps: of the training schedule.
        x_0_error: as `measure` gave it for that.
        eta: of (3).
    """
    abar, prev = schedule.alpha_bar, schedule.alpha_bar_prev
    # By `timesteps`, not by index: knots count in steps of training.
    v = np.interp(schedule.timesteps, knots(num_timesteps), x_0_error)
    v = np.clip(v, 0, (1 - abar) / abar)
    lambda_2 = eta**2 * schedule.posterior_variance
    # The maximum is against rounding, as in DDIM's tables.
    c = np.sqrt(prev) - np.sqrt(np.maximum(1 - prev - lambda_2, 0) * abar / (1 - abar))
    sigma_2 = lambda_2 + c**2 * v
    sigma_2[:1] = 0
    return sigma_2
