"""DDIM backwards: exact where the denoiser is known, and nearer with more steps and evaluations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import EPS

from dalle2_jax.diffusion import gaussian, sample, schedules, solvers
from dalle2_jax.diffusion.inversion import DDIMInversion, invert_steps
from dalle2_jax.types import Denoiser, Prediction

FULL = schedules.cosine(1000)
STD = 0.4
X_0 = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32) * STD


def normal(s: schedules.Schedule) -> Denoiser:
    """E[x_0 | x_t] where x_0 is normal of deviation STD."""

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        signal = schedules.extract(s.sqrt_alpha_bar, t, 2)
        noise = schedules.extract(1 - s.alpha_bar, t, 2)
        x_0 = signal * STD**2 / (signal**2 * STD**2 + noise) * x_t
        return Prediction(x_0, gaussian.eps_from_x_0(s, x_t, x_0, t))

    return denoiser


def invert(s: schedules.Schedule, iterations: int) -> np.ndarray:
    steps = s.num_timesteps
    solver = DDIMInversion(s)
    run = jax.jit(lambda x: invert_steps(solver, normal(s), x, 0, steps, iterations))
    return np.asarray(run(jnp.asarray(X_0)))


def draw(s: schedules.Schedule, x_T: np.ndarray) -> np.ndarray:
    unused = jnp.zeros((s.num_timesteps, *x_T.shape))
    run = jax.jit(lambda x: sample.sample(solvers.DDIM(s), normal(s), x, None, s, noise=unused))
    return np.asarray(run(x_T))


def test_x_T_of_a_normal_distribution_is_x_0_by_its_deviation():
    """The probability flow of a normal distribution scales it, so that x_T = x_0 / STD."""
    errors = [
        np.abs(invert(schedules.respace(FULL, steps, "even"), 1) - X_0 / STD).max()
        for steps in (50, 100, 200)
    ]
    assert errors[2] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert 1.5 < coarse / fine < 2.6  # of first order: about 2


def test_more_evaluations_come_to_the_exact_inverse_of_ddim():
    # Not up to pure noise, where rounding errors of x_t grow by 1 / sqrt(abar) = 2e4 in x_0. At
    # t = 960 they grow by 16, and the errors of up to three evaluations are far above rounding.
    s = schedules.respace(FULL, range(0, 961, 40))
    errors = [np.abs(draw(s, invert(s, n)) - X_0).max() for n in (1, 2, 3, 12)]
    assert errors[0] > 0.05
    assert all(more < less / 3 for less, more in itertools.pairwise(errors[:3]))
    # 25 steps there and back, each rounding |x_t| <= 4 a few times, and the growth by 16.
    assert errors[3] < 2 * 25 * 16 * 4 * EPS < errors[2] / 3


@pytest.mark.parametrize("t", [0, 1, 13, 24])
def test_a_step_undoes_a_step_of_ddim_where_eps_does_not_change(t):
    s = schedules.respace(FULL, 25, "even")
    eps = jnp.asarray(np.random.default_rng(1).standard_normal(X_0.shape), jnp.float32)

    def constant(x_t: jax.Array, t: jax.Array) -> Prediction:
        return Prediction(gaussian.x_0_from_eps(s, x_t, eps, t), eps)

    x, step = jnp.asarray(X_0), jnp.asarray(t)
    up = DDIMInversion(s).inverse_step(constant, x, step, 1)
    down, _ = solvers.DDIM(s).step(constant, up, step, jnp.zeros(x.shape), ())
    # x_0 is a difference of numbers up to 4, of which each is rounded to EPS / 2, over sqrt(abar).
    growth = np.sqrt(s.alpha_bar_prev[t] / s.alpha_bar[t])
    np.testing.assert_allclose(down, x, atol=8 * EPS * growth)
