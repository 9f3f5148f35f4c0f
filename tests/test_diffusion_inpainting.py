"""Drawing what is missing: the projection of what is known, and RePaint's resampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import schedules
from dalle2_jax.diffusion.gaussian import eps_from_x_0
from dalle2_jax.diffusion.inpainting import Resampling, keeping, num_calls
from dalle2_jax.diffusion.sample import init_noise, sample
from dalle2_jax.diffusion.solvers import DDIM
from dalle2_jax.types import Prediction

STEPS = 20
SCHEDULE = schedules.respace(schedules.cosine(1000), STEPS, "even")


def keys(count: int):
    return jax.random.split(jax.random.key(0), count)


def gaussian_denoiser(covariance: np.ndarray):
    """The exact one for images of one pixel whose three channels are N(0, covariance)."""
    abar = jnp.asarray(SCHEDULE.alpha_bar, jnp.float32)
    values, vectors = np.linalg.eigh(covariance)

    def denoiser(x_t, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        variances = jnp.asarray(values, jnp.float32)[None, None, None]
        gain = jnp.sqrt(a) * variances / (a * variances + 1 - a)
        x_0 = (x_t @ vectors * gain) @ vectors.T
        return Prediction(x_0=x_0, eps=eps_from_x_0(SCHEDULE, x_t, x_0, t))

    return denoiser


def test_what_is_known_is_in_every_prediction_but_the_last():
    known = jnp.zeros((2, 4, 4, 4)).at[:, :, :2, :].set(1.0)
    x_t = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))

    def half(x_t, t):
        return Prediction(x_0=x_t / 2, eps=eps_from_x_0(SCHEDULE, x_t, x_t / 2, t))

    for t, seen in ((jnp.array([5, 5]), True), (jnp.array([0, 0]), False)):
        pred = keeping(SCHEDULE, half, known)(x_t, t)
        np.testing.assert_array_equal(pred.x_0[:, :, 2:], x_t[:, :, 2:] / 2)
        assert bool((pred.x_0[:, :, :2] == 1).all()) is seen
        np.testing.assert_allclose(pred.eps, eps_from_x_0(SCHEDULE, x_t, pred.x_0, t), atol=1e-6)


def test_one_repeat_is_the_solver_itself():
    assert num_calls(STEPS, 1) == STEPS and num_calls(STEPS, 3) == 58
    x_T = init_noise(keys(4), (1, 1, 3))
    denoiser = gaussian_denoiser(np.eye(3))
    plain = sample(DDIM(SCHEDULE), denoiser, x_T, keys(4), STEPS)
    again = sample(Resampling(DDIM(SCHEDULE), SCHEDULE, 1), denoiser, x_T, keys(4), STEPS)
    np.testing.assert_allclose(plain, again, atol=1e-6)


def test_a_step_back_is_the_forward_process():
    """x_{t-1} at its own variance comes back with that of x_t."""
    repeated = Resampling(DDIM(SCHEDULE), SCHEDULE, 2)
    denoiser = gaussian_denoiser(np.eye(3))  # every x_t has variance 1
    x_t, noise = jax.random.normal(jax.random.key(3), (2, 20_000, 1, 1, 3))
    last = jnp.int32(num_calls(STEPS, 2) - 1)
    x, _ = repeated.step(denoiser, x_t, last, noise, ())
    # Five standard deviations of a variance of 60,000 samples, sqrt(2 / 60,000), and more of a
    # correlation of as many.
    assert float(x.var()) == pytest.approx(1, abs=0.03)
    correlation = np.corrcoef(np.ravel(x), np.ravel(x_t))[0, 1]
    # Of x_t = s x_0 + n eps DDIM makes s' x_0 + n' eps, of which (2) keeps sqrt(a / b).
    a, b = SCHEDULE.alpha_bar[-1], SCHEDULE.alpha_bar_prev[-1]
    ddim = np.sqrt(a * b) + np.sqrt((1 - a) * (1 - b))
    assert correlation == pytest.approx(np.sqrt(a / b) * ddim, abs=0.03)


def test_resampling_brings_the_missing_nearer_to_what_goes_with_the_known():
    """Of two channels with a correlation of 0.95 one is known, to be 1: the other is 0.95 then."""
    covariance = np.array([[1, 0.95, 0], [0.95, 1, 0], [0, 0, 1.0]])
    exact = gaussian_denoiser(covariance)
    mask = jnp.array([1.0, 0, 0])[None, None, None]

    def kept(x_t, t):  # `keeping`, with a mask that differs from channel to channel
        pred = exact(x_t, t)
        x_0 = mask + (1 - mask) * pred.x_0
        return Prediction(x_0=x_0, eps=eps_from_x_0(SCHEDULE, x_t, x_0, t))

    def missing(repeats: int) -> float:
        solver = Resampling(DDIM(SCHEDULE), SCHEDULE, repeats)
        x_T = init_noise(keys(256), (1, 1, 3))
        drawn = sample(solver, kept, x_T, keys(256), num_calls(STEPS, repeats))
        return float(drawn[..., 1].mean())

    once, often = missing(1), missing(10)
    assert abs(often - 0.95) < abs(once - 0.95) / 2
