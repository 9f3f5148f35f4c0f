"""Analytic-DPM: variances that are exact where the data is Gaussian, and how they are measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import analytic, schedules
from dalle2_jax.diffusion.gaussian import q_sample
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sample import denoiser_from, init_noise, sample
from dalle2_jax.diffusion.solvers import DDIM, DDPM

TOTAL = 1000
FULL = schedules.cosine(TOTAL)
VARIANCE = 0.3
PEAK, WIDTH = 0.5, 0.01  # a mixture: x_0 of N(+-PEAK, WIDTH) in every coordinate


def abar(t, ndim):
    return jnp.asarray(FULL.alpha_bar, jnp.float32)[t].reshape(-1, *[1] * (ndim - 1))


def gaussian(x_t, t):
    """E[x_0 | x_t] for x_0 of N(0, VARIANCE)."""
    a = abar(t, x_t.ndim)
    return jnp.sqrt(a) * VARIANCE / (a * VARIANCE + 1 - a) * x_t


def mixture(x_t, t):
    """E[x_0 | x_t]: the two Gaussians' means, by how likely each is."""
    a = abar(t, x_t.ndim)
    total = a * WIDTH + 1 - a
    side = jnp.tanh(PEAK * jnp.sqrt(a) * x_t / total)
    pull = jnp.sqrt(a) * WIDTH / total
    return side * PEAK * (1 - jnp.sqrt(a) * pull) + pull * x_t


def gaussian_error(t) -> np.ndarray:
    """The variance of x_0 given x_t."""
    a = FULL.alpha_bar[t]
    return VARIANCE * (1 - a) / (a * VARIANCE + 1 - a)


def mixture_error(t) -> np.ndarray:
    """The same by integration over x_t, of which the right-hand half is enough."""
    found = []
    for a in FULL.alpha_bar[t]:
        std, mean = np.sqrt(a * WIDTH + 1 - a), np.sqrt(a) * PEAK
        x = mean + std * np.linspace(-9, 9, 20_001)
        density = np.exp(-0.5 * ((x - mean) / std) ** 2)
        likely = 1 / (1 + np.exp(-2 * mean * x / std**2))  # of the right-hand one
        # of the two components, what each leaves open and how far their means lie apart
        pull = np.sqrt(a) * WIDTH / std**2
        gap = 2 * PEAK * (1 - np.sqrt(a) * pull)
        within = WIDTH * (1 - a) / std**2
        found.append(within + gap**2 * np.average(likely * (1 - likely), weights=density))
    return np.array(found)


def draws(kind: str, shape) -> jax.Array:
    key, side = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(key, shape)
    if kind == "gaussian":
        return VARIANCE**0.5 * noise
    return jax.random.rademacher(side, shape, jnp.float32) * PEAK + WIDTH**0.5 * noise


KNOWN = {"gaussian": (gaussian, gaussian_error), "mixture": (mixture, mixture_error)}


def as_raw(kind: str, x_0_of):
    """A network that says the same by x_0, eps or v."""

    def apply(x_t, t):
        x_0, a = x_0_of(x_t, t), abar(t, x_t.ndim)
        eps = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        v = jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_0
        return {"x_0": x_0, "eps": eps, "v": v}[kind]

    return apply


def measured(data: str, kind: str = "x_0", learned: bool = False, network=None) -> np.ndarray:
    process = Process("cosine", TOTAL, kind, learned)
    network = network or as_raw(kind, KNOWN[data][0])

    def apply(x_t, t):
        out = network(x_t, t)
        return jnp.concatenate([out, out], axis=-1) if learned else out

    return np.asarray(analytic.measure(process, apply, draws(data, (512, 64)), jax.random.key(1)))


@pytest.mark.parametrize("kind", ["x_0", "eps", "v"])
@pytest.mark.parametrize("data", KNOWN)
def test_what_is_measured_is_the_variance_of_x_0_given_x_t(data, kind):
    found = measured(data, kind)
    assert found.shape == (analytic.KNOTS,)
    # The last abar is 2e-9: by eps that is more than float32 tells, and the bound is what is left.
    n = -1 if kind == "eps" else None
    wanted = KNOWN[data][1](analytic.knots(TOTAL))
    # A mean square of 512 x 64 samples has a standard deviation of sqrt(2 / 32768) = 0.8 % where
    # they are normal, and more where the mixture's are rare and large.
    np.testing.assert_allclose(found[:n], wanted[:n], rtol=0.07)
    np.testing.assert_allclose(measured(data, kind, True)[:n], wanted[:n], rtol=0.07)


def test_where_the_network_errs_the_measure_stays_within_bounds():
    square = float(jnp.mean(draws("gaussian", (512, 64)) ** 2))
    nonsense = measured("gaussian", network=lambda x_t, t: 9 * jnp.ones_like(x_t))
    np.testing.assert_allclose(nonsense, square, rtol=1e-6)
    table = analytic.variances(schedules.respace(FULL, 64), TOTAL, nonsense)
    assert np.isfinite(table).all() and table.max() < 1 + square


def solver_of(schedule, data, eta):
    table = analytic.variances(schedule, TOTAL, measured(data), eta)
    return DDPM(schedule, table) if eta == 1 else DDIM(schedule, eta, table)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_few_steps_keep_the_variance_of_gaussian_data(eta, steps):
    schedule = schedules.respace(FULL, steps, "even")
    denoiser = denoiser_from(schedule, gaussian, "x_0")

    def drawn(solver) -> float:
        keys = jax.random.split(jax.random.key(2), 512)
        return float(sample(solver, denoiser, init_noise(keys, (64,)), keys, steps).var())

    # The last step draws no noise: what it leaves out is the variance of x_0 at t = 0.
    wanted = VARIANCE - gaussian_error([0])[0]
    # Both the table and the samples are of 512 x 64 values, 0.8 % each: four standard deviations.
    assert drawn(solver_of(schedule, "gaussian", eta)) == pytest.approx(wanted, rel=0.045)
    if steps < 20:
        assert drawn(DDIM(schedule, eta)) < 0.95 * wanted


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("data", KNOWN)
def test_a_step_of_any_length_keeps_the_variance_of_any_data(data, eta):
    """x_{t-1} of a true x_t has the variance of a true x_{t-1}, as its mean is E[x_{t-1} | x_t]."""
    schedule = schedules.respace(FULL, 6, "even")
    solver, x_0 = solver_of(schedule, data, eta), draws(data, (4096, 64))
    noise, other = (jax.random.normal(jax.random.key(i), x_0.shape) for i in (5, 6))
    for t in range(1, 6):
        x_t = q_sample(schedule, x_0, t, noise)
        denoiser = denoiser_from(schedule, KNOWN[data][0], "x_0")
        x, _ = solver.step(denoiser, x_t, jnp.int32(t), other, ())
        prev = schedule.alpha_bar[t - 1]
        wanted = prev * float(x_0.var()) + 1 - prev
        assert float(x.var()) == pytest.approx(wanted, rel=0.02), t


def test_ddpm_is_ddim_of_eta_1():
    schedule = schedules.respace(FULL, 7)
    table = analytic.variances(schedule, TOTAL, gaussian_error(analytic.knots(TOTAL)))
    keys = jax.random.split(jax.random.key(3), 8)
    told = denoiser_from(schedule, gaussian, "x_0"), init_noise(keys, (16,)), keys, schedule
    a, b = sample(DDPM(schedule, table), *told), sample(DDIM(schedule, 1.0, table), *told)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 7, 64, TOTAL])
def test_the_variance_lies_within_the_bounds_of_theorem_2(steps, eta):
    schedule = schedules.respace(FULL, steps, "even")
    knots = analytic.knots(TOTAL)
    low = analytic.variances(schedule, TOTAL, np.zeros(len(knots)), eta)
    high = analytic.variances(schedule, TOTAL, np.full(len(knots), 1e30), eta)
    # Data of one point: x_t tells x_0 exactly. Data without bounds: nothing is told.
    np.testing.assert_allclose(low, eta**2 * schedule.posterior_variance)
    between = analytic.variances(schedule, TOTAL, gaussian_error(knots), eta)
    assert (low <= between).all() and (between <= high).all()
    assert between[0] == high[0] == 0  # the last step draws no noise
    # Theorem 1 as the paper writes it, of the true mean square of the score.
    a, prev = schedule.alpha_bar, schedule.alpha_bar_prev
    lambda_2 = eta**2 * schedule.posterior_variance
    factor = np.sqrt((1 - a) / schedule.alpha) - np.sqrt(np.maximum(1 - prev - lambda_2, 0))
    np.testing.assert_allclose(high[1:], (lambda_2 + factor**2)[1:], rtol=1e-6)
    gamma = 1 / (a * VARIANCE + 1 - a)
    exact = lambda_2 + factor**2 * (1 - (1 - a) * gamma)
    # In float64: the difference is that of interpolation between the knots, at most 1.6 %.
    np.testing.assert_allclose(between[1:], exact[1:], rtol=0.04)


def test_knots_hold_both_ends():
    for total in (1, 20, TOTAL):
        knots = analytic.knots(total)
        assert len(knots) == analytic.KNOTS and knots[0] == 0 and knots[-1] == total - 1
        assert (np.diff(knots) >= 0).all()
