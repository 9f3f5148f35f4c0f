"""Analytic-DPM: variances that are exact where the data is Gaussian, and how they are measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import analytic, schedules
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sample import denoiser_from, init_noise, sample
from dalle2_jax.diffusion.solvers import DDPM

TOTAL = 1000
PROCESS = Process(schedule="cosine", num_timesteps=TOTAL, prediction="x_0")
FULL = schedules.cosine(TOTAL)
VARIANCE = 0.3


def predicts(x_t, t):
    """E[x_0 | x_t] for x_0 of N(0, VARIANCE)."""
    a = jnp.asarray(FULL.alpha_bar, jnp.float32)[t].reshape(-1, *[1] * (x_t.ndim - 1))
    return jnp.sqrt(a) * VARIANCE / (a * VARIANCE + 1 - a) * x_t


def true_eps_square() -> np.ndarray:
    """eps = sqrt(1 - a) x_t / (a VARIANCE + 1 - a), and x_t has that variance."""
    a = FULL.alpha_bar
    return (1 - a) / (a * VARIANCE + 1 - a)


def test_what_is_measured_is_the_mean_square_of_the_predicted_noise():
    x_0 = VARIANCE**0.5 * jax.random.normal(jax.random.key(0), (512, 64))
    found = np.asarray(analytic.measure(PROCESS, predicts, x_0, jax.random.key(1)))
    assert found.shape == (analytic.KNOTS,)
    wanted = true_eps_square()[analytic.knots(TOTAL)]
    # At t = 0 x_t is nearly all x_0, of which eps takes a difference: the rounding shows.
    np.testing.assert_allclose(found[1:], wanted[1:], rtol=0.03)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_few_steps_keep_the_variance_of_gaussian_data(steps):
    schedule = schedules.respace(FULL, steps, "even")
    table = analytic.variances(schedule, TOTAL, true_eps_square())
    denoiser = denoiser_from(schedule, predicts, "x_0")

    def drawn(variance) -> float:
        keys = jax.random.split(jax.random.key(2), 256)
        x_T = init_noise(keys, (64,))
        return float(sample(DDPM(schedule, variance), denoiser, x_T, keys, schedule).var())

    # The last step has no noise: what it leaves out is the variance of x_0 at t = 0.
    a = schedule.alpha_bar[0]
    left = VARIANCE * (1 - a) / (a * VARIANCE + 1 - a)
    assert drawn(table) == pytest.approx(VARIANCE - left, rel=0.03)
    if steps < 20:
        assert drawn("small") < 0.9 * (VARIANCE - left)


def test_the_variance_lies_within_the_bounds_of_theorem_2():
    for steps in (2, 7, 64, TOTAL):
        schedule = schedules.respace(FULL, steps, "even")
        low = analytic.variances(schedule, TOTAL, [1.0, 1.5])  # more than all is noise
        high = analytic.variances(schedule, TOTAL, [0.0, 0.0])
        np.testing.assert_allclose(low, schedule.posterior_variance)
        # Of data that is one point x_t tells x_0 exactly, and eps has a mean square of 1; of data
        # without bounds nothing is told: x_{t-1} is x_t / sqrt(a) with the step's noise.
        np.testing.assert_allclose(high, schedule.beta / schedule.alpha, rtol=1e-9)
        between = analytic.variances(schedule, TOTAL, true_eps_square())
        assert (low <= between).all() and (between <= high).all()


def test_knots_hold_both_ends():
    assert analytic.knots(20)[0] == 0 and analytic.knots(20)[-1] == 19
    assert len(analytic.knots(TOTAL)) == analytic.KNOTS
