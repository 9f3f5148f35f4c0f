"""How fast each solver's error falls with its steps, on a mixture of gaussians.

The reference is the probability-flow ODE, integrated in float64 by the classical Runge-Kutta method
with steps a hundred times finer. Compared is x where the last step, to sigma = 0, begins: of first
order for every solver, it only tells x_0 of x_t.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import gaussian, sample, schedules, solvers
from dalle2_jax.types import Prediction

MEANS = np.array([[-0.8, 0.0], [0.6, 0.7], [0.6, -0.7]])
LOG_WEIGHTS = np.log([0.5, 0.3, 0.2])
STD = 0.5
NOISIEST, CLEANEST = -6.0, 2.0  # lambda = logsnr / 2
X_T = np.random.default_rng(0).standard_normal((64, 2))


def expected_x_0(x_t, alpha, np=np):
    """E[x_0 | x_t], x_t [n, 2]; `np` may be jax's."""
    variance = alpha**2 * STD**2 + 1 - alpha**2
    gap = x_t[:, None, :] - alpha * MEANS  # n k 2
    log_p = LOG_WEIGHTS - (gap**2).sum(-1) / (2 * variance)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    x_0_of = MEANS + alpha * STD**2 / variance * gap
    return ((p / p.sum(1, keepdims=True))[:, :, None] * x_0_of).sum(1)


def alpha_of(lambda_):
    return 1 / np.sqrt(1 + np.exp(-2 * lambda_))


@functools.cache
def reference(steps: int = 4000) -> np.ndarray:
    """Where X_T flows to: d(x / alpha) / d lambda = E[x_0 | x] - x / alpha."""

    def slope(lambda_, y):
        return expected_x_0(alpha_of(lambda_) * y, alpha_of(lambda_)) - y

    h = (CLEANEST - NOISIEST) / steps
    y = X_T / alpha_of(NOISIEST)
    for i in range(steps):
        at = NOISIEST + i * h
        k_1 = slope(at, y)
        k_2 = slope(at + h / 2, y + h / 2 * k_1)
        k_3 = slope(at + h / 2, y + h / 2 * k_2)
        k_4 = slope(at + h, y + h * k_3)
        y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return alpha_of(CLEANEST) * y


def even_schedule(steps: int) -> schedules.Schedule:
    """Even in lambda, with no timestep rounded: `steps` steps and the last."""
    lambda_ = np.linspace(CLEANEST, NOISIEST, steps + 1)
    return schedules.Schedule(alpha_of(lambda_) ** 2, np.arange(steps + 1))


def error(name: str, steps: int) -> float:
    s = even_schedule(steps)

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        alpha = schedules.extract(s.sqrt_alpha_bar, t, 2)[:1]
        with jax.numpy_rank_promotion("allow"):
            x_0 = expected_x_0(x_t, alpha, jnp).astype(jnp.float32)
        return Prediction(x_0, gaussian.eps_from_x_0(s, x_t, x_0, t))

    solver, x_T = solvers.make_solver(name, s), jnp.asarray(X_T, jnp.float32)
    noise = jnp.zeros((steps, *x_T.shape))
    run = jax.jit(
        lambda x: (
            sample.advance(
                solver, denoiser, sample.begin(solver, x), steps, steps, None, noise=noise
            ).x_t
        )
    )
    return float(np.sqrt(((np.asarray(run(x_T), np.float64) - reference()) ** 2).mean()))


# UniPC-p is of order p + 1: its corrector adds one (2302.04867, theorem 3.1).
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2), ("dpm++3m", 3), ("unipc", 3)]
)
def test_the_error_falls_as_the_order_says(name: str, order: int) -> None:
    steps = np.array([24, 34, 48, 68])
    errors = np.array([error(name, int(n)) for n in steps])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.35 < slope < order + 0.9, (slope, errors)


def test_the_higher_order_wins() -> None:
    errors = [error(name, 48) for name in ("ddim", "dpm++", "unipc", "dpm++3m")]
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors


def test_the_reference_is_exact_enough() -> None:
    np.testing.assert_allclose(reference(), reference(1000), atol=1e-9)


@pytest.mark.parametrize("name", ["dpm++3m", "dpm++sde", "unipc", "heun"])
@pytest.mark.parametrize(
    "s",
    [
        schedules.respace(schedules.cosine(1000), 10),
        schedules.respace(schedules.cosine(1000), 27, "fast27"),
        schedules.respace(schedules.cosine(1000), [0, 1, 500, 501, 999]),
        schedules.respace(schedules.linear(1000), 15, "logsnr"),
    ],
)
def test_of_a_constant_x_0_every_step_keeps_the_marginals(name: str, s: schedules.Schedule) -> None:
    """x_t = alpha x_0 + sigma eps all the way, for the deterministic ones at any step's length."""
    x_0, eps = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        constant = jnp.asarray(x_0)
        return Prediction(constant, gaussian.eps_from_x_0(s, x_t, constant, t))

    solver = solvers.make_solver(name, s)
    step = jax.jit(lambda x, t, memory: solver.step(denoiser, x, t, jnp.zeros((5, 3)), memory))
    at = lambda t: s.sqrt_alpha_bar[t] * x_0 + s.sqrt_one_minus_alpha_bar[t] * eps  # noqa: E731
    x = jnp.asarray(at(s.num_timesteps - 1), jnp.float32)
    memory = solver.init(x)
    for t in range(s.num_timesteps - 1, 0, -1):
        x, memory = step(x, jnp.int32(t), memory)
        if name != "dpm++sde":  # whose noise is left out here: its share of x_0 alone is told
            np.testing.assert_allclose(x, at(t - 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(step(x, jnp.int32(0), memory)[0], x_0, atol=1e-6)


def gaussian_moments(steps: int, mean: float, variance: float) -> tuple[float, float]:
    """How far mean and variance of x end from those of N(mean, variance), noised.

    Each x is linear in x_T and in the noise of every step, so that a row with one unit among them
    tells its share of the covariance: nothing is drawn.
    """
    s = even_schedule(steps)

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        share = s.sqrt_alpha_bar * variance / (s.alpha_bar * variance + 1 - s.alpha_bar)
        gap = x_t - mean * schedules.extract(s.sqrt_alpha_bar, t, 2)
        x_0 = mean + schedules.extract(share, t, 2) * gap
        return Prediction(x_0, gaussian.eps_from_x_0(s, x_t, x_0, t))

    solver = solvers.make_solver("dpm++sde", s)
    means, variances = s.sqrt_alpha_bar * mean, s.alpha_bar * variance + 1 - s.alpha_bar
    units = np.eye(steps + 2, steps + 1)  # the last row: none
    x_T = jnp.asarray(means[-1] + np.sqrt(variances[-1]) * units[:, :1], jnp.float32)
    noise = jnp.asarray(units[:, 1:].T[:, :, None], jnp.float32)
    run = jax.jit(
        lambda x: (
            sample.advance(
                solver, denoiser, sample.begin(solver, x), steps, steps, None, noise=noise
            ).x_t
        )
    )
    x = np.asarray(run(x_T), np.float64)[:, 0]
    return abs(x[-1] - means[0]), abs(((x[:-1] - x[-1]) ** 2).sum() - variances[0])


def test_the_sde_draws_from_a_gaussian_to_second_order() -> None:
    steps = np.array([12, 24, 48, 96, 192])
    off = np.array([gaussian_moments(int(n), 0.7, 0.16) for n in steps])
    assert off[:, 0].max() < 1e-5  # a mean of any kind is kept
    slope = -np.polyfit(np.log(steps), np.log(off[:, 1]), 1)[0]
    assert 2 - 0.35 < slope < 2 + 0.9, (slope, off)
    assert off[1, 1] < 0.01 * 0.16
