"""Solvers against distributions whose exact denoiser is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import gaussian, sample, schedules, solvers
from dalle2_jax.errors import UserError
from dalle2_jax.types import Denoiser, Prediction

MEANS = np.array([[-0.8, 0.0], [0.6, 0.7], [0.6, -0.7]], np.float32)
WEIGHTS = np.array([0.5, 0.3, 0.2], np.float32)
STD = 0.1
FULL = schedules.cosine(1000)


def mixture(s: schedules.Schedule) -> Denoiser:
    """E[x_0 | x_t] where x_0 is a mixture of three gaussians in the plane."""

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        signal = schedules.extract(s.sqrt_alpha_bar, t, 2)
        variance = signal**2 * STD**2 + schedules.extract(1 - s.alpha_bar, t, 2)  # b 1
        gap = x_t[:, None, :] - signal[:, :, None] * MEANS[None]  # b k 2
        log_p = np.log(WEIGHTS)[None] - (gap**2).sum(-1) / (2 * variance)
        x_0_of = MEANS[None] + (signal * STD**2 / variance)[:, :, None] * gap
        x_0 = (jax.nn.softmax(log_p)[:, :, None] * x_0_of).sum(1)
        return Prediction(x_0, gaussian.eps_from_x_0(s, x_t, x_0, t))

    return denoiser


run = jax.jit(sample.sample, static_argnums=(0, 1, 4))


def drawn(steps: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """x_T and the noise of every step, from numpy: it needs no compiling."""
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((n, 2), dtype=np.float32),
        rng.standard_normal((steps, n, 2), dtype=np.float32),
    )


def draw(
    solver: solvers.Solver, s: schedules.Schedule, n: int, denoiser: Denoiser | None = None
) -> np.ndarray:
    x_T, noise = drawn(s.num_timesteps, n)
    return np.asarray(run(solver, denoiser or mixture(s), x_T, None, s, noise=noise))


@pytest.mark.parametrize(
    ("name", "options", "steps", "spacing"),
    [
        ("ddpm", {}, 250, "even"),
        ("ddpm", {"variance": "large"}, 250, "even"),
        ("ddim", {}, 100, "even"),
        ("ddim", {"eta": 0.5}, 100, "even"),
        ("ddim", {"eta": 1.0}, 250, "even"),
        ("dpm++", {}, 25, "logsnr"),
        ("dpm++3m", {}, 20, "logsnr"),
        ("dpm++sde", {}, 40, "logsnr"),
        ("unipc", {}, 15, "logsnr"),
        ("heun", {}, 20, "logsnr"),
    ],
)
def test_the_exact_denoiser_recovers_the_mixture(
    name: str, options: dict, steps: int, spacing: str
) -> None:
    s = schedules.respace(FULL, steps, spacing)
    x = draw(solvers.make_solver(name, s, **options), s, 4096)
    mode = np.argmin(((x[:, None] - MEANS[None]) ** 2).sum(-1), axis=1)
    # Four standard deviations of a frequency at n = 4096 are 0.031.
    np.testing.assert_allclose(np.bincount(mode, minlength=3) / len(x), WEIGHTS, atol=0.035)
    # Four standard deviations of a mean of the rarest mode's 819 are 0.014, of a std 10 %; the rest
    # is the error of few steps, which leaves the std up to 10 % from STD. In float32 it has three
    # digits more.
    for k in range(3):
        np.testing.assert_allclose(x[mode == k].mean(0), MEANS[k], atol=0.03)
        np.testing.assert_allclose(x[mode == k].std(0), STD, rtol=0.2)


def ode_error(name: str, steps: int, variance: float = 0.25) -> float:
    """Error against the exact flow of N(0, variance), which only scales x."""
    s = schedules.respace(schedules.linear(1000), steps, "logsnr")
    scale = lambda abar: np.sqrt(abar * variance + 1 - abar)  # noqa: E731

    def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
        c = schedules.extract(s.sqrt_alpha_bar * variance / scale(s.alpha_bar) ** 2, t, 2)
        return Prediction(c * x_t, gaussian.eps_from_x_0(s, x_t, c * x_t, t))

    solver = solvers.make_solver(name, s)
    got = run(solver, denoiser, jnp.ones((1, 1)), None, s, noise=jnp.zeros((steps, 1, 1)))
    return abs(float(got[0, 0]) - np.sqrt(variance) / scale(s.alpha_bar[-1]))


def test_ddim_is_of_first_order_and_2m_of_second() -> None:
    ddim = [ode_error("ddim", n) for n in (20, 40, 80)]
    multi = [ode_error("dpm++", n) for n in (20, 40, 80)]
    # 2 and 4, but for the next order of these steps' length; rounding is far below every error.
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(ddim))
    assert all(a / b > 3.5 for a, b in itertools.pairwise(multi))
    assert all(m < d / 5 for m, d in zip(multi, ddim, strict=True))


def test_2m_beats_ddim_at_equal_steps() -> None:
    x_ref = draw(solvers.DDIM(FULL), FULL, 512)  # a thousand steps
    for spacing in ("even", "logsnr"):
        s = schedules.respace(FULL, 20, spacing)
        ddim, multi = (
            np.abs(draw(solvers.make_solver(name, s), s, 512) - x_ref).mean()
            for name in ("ddim", "dpm++")
        )
        assert multi < 0.5 * ddim


@pytest.mark.parametrize(
    "s",
    [
        schedules.respace(FULL, 10),
        schedules.respace(FULL, [10, 10, 3, 2, 2], "sections"),
        schedules.respace(FULL, [0, 1, 500, 501, 999]),
    ],
)
def test_2m_never_extrapolates_wildly(s: schedules.Schedule) -> None:
    c_x_t, c_x_0, c_past = solvers.DPMSolverPP2M(s)._tables
    assert (np.abs(c_x_0) <= 2).all() and (np.abs(c_past) <= 1).all()
    # Of a constant x_0 every step keeps the marginals: nothing is gained or lost.
    np.testing.assert_allclose(
        c_x_t * s.sqrt_alpha_bar + c_x_0 + c_past, np.sqrt(s.alpha_bar_prev), rtol=1e-9
    )


def test_ddim_with_eta_one_is_ddpm() -> None:
    s = schedules.respace(FULL, 30)
    ddpm, ddim = (draw(solver, s, 8) for solver in (solvers.DDPM(s), solvers.DDIM(s, eta=1.0)))
    np.testing.assert_allclose(ddim, ddpm, atol=1e-4)


def test_ddpm_takes_the_learned_variance() -> None:
    s = schedules.respace(FULL, 30)

    def learned(table: np.ndarray) -> Denoiser:
        def denoiser(x_t: jax.Array, t: jax.Array) -> Prediction:
            log_variance = jnp.broadcast_to(schedules.extract(table, t, 2), x_t.shape)
            return mixture(s)(x_t, t)._replace(log_variance=log_variance)

        return denoiser

    for name, table in [("small", s.posterior_log_variance_clipped), ("large", np.log(s.beta))]:
        fixed = draw(solvers.DDPM(s, name), s, 4)
        got = draw(solvers.DDPM(s), s, 4, learned(table))
        own = draw(solvers.DDPM(s, np.exp(table)), s, 4)
        np.testing.assert_allclose(got, fixed, atol=1e-5)
        np.testing.assert_allclose(own, fixed, atol=1e-5)


@pytest.mark.parametrize("name", solvers.NAMES)
def test_the_last_step_gives_the_predicted_x_0(name: str) -> None:
    s = schedules.respace(FULL, 5)
    solver = solvers.make_solver(name, s)
    x_t = jnp.array([[0.3, -0.2]])
    step = jax.jit(solver.step, static_argnums=0)
    x_0, _ = step(mixture(s), x_t, jnp.int32(0), jnp.ones((1, 2)), solver.init(x_t))
    expected = mixture(s)(x_t, jnp.zeros(1, jnp.int32)).x_0
    np.testing.assert_allclose(x_0, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", solvers.NAMES)
def test_the_shortest_schedules_work(name: str, steps: int) -> None:
    s = schedules.respace(FULL, steps)
    x = draw(solvers.make_solver(name, s), s, 16)
    assert np.isfinite(x).all() and np.abs(x).max() < 3


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"did you mean 'dpm\+\+'"):
        solvers.make_solver("dpm+", FULL)
    with pytest.raises(UserError, match="did you mean 'ddim'"):
        solvers.make_solver("dimm", FULL)
    with pytest.raises(UserError, match=r"did you mean 'dpm\+\+3m'"):
        solvers.make_solver("dpm++3", FULL)
    with pytest.raises(UserError, match="no option 'eta'"):
        solvers.make_solver("dpm++", FULL, eta=1.0)
    with pytest.raises(UserError, match="eta must be"):
        solvers.make_solver("ddim", FULL, eta=2.0)
    with pytest.raises(UserError, match="'small', 'large' or a table, not 'medium'"):
        solvers.make_solver("ddpm", FULL, variance="medium")
