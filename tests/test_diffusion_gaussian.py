"""q and its posterior against first principles; x_0, eps and v as three names of one thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import gaussian, schedules
from dalle2_jax.errors import UserError

q_sample = jax.jit(gaussian.q_sample, static_argnums=0)
q_posterior = jax.jit(gaussian.q_posterior, static_argnums=0)
x_0_from_eps = jax.jit(gaussian.x_0_from_eps, static_argnums=0)
eps_from_x_0 = jax.jit(gaussian.eps_from_x_0, static_argnums=0)
v_from = jax.jit(gaussian.v_from, static_argnums=0)
x_0_from_v = jax.jit(gaussian.x_0_from_v, static_argnums=0)
eps_from_v = jax.jit(gaussian.eps_from_v, static_argnums=0)
to_prediction = jax.jit(gaussian.to_prediction, static_argnums=(0, 1, 5, 6))

SCHEDULES = [schedules.cosine(100), schedules.linear(100)]
SHAPES = [(5, 4, 4, 3), (5, 8)]
T = jnp.array([0, 10, 50, 90, 97])


@functools.partial(jax.jit, static_argnums=0)
def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, jax.Array]:
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.uniform(a, shape, minval=-1, maxval=1), jax.random.normal(b, shape)


@pytest.mark.parametrize("s", SCHEDULES)
def test_steps_of_q_compose_to_the_closed_form(s: schedules.Schedule) -> None:
    mean, variance = [1.0], [0.0]  # of x_t given x_0 = 1, one step of q after the other
    for alpha, beta in zip(s.alpha, s.beta, strict=True):
        mean.append(np.sqrt(alpha) * mean[-1])
        variance.append(alpha * variance[-1] + beta)
    t, one, zero = jnp.arange(100), jnp.ones((100, 1)), jnp.zeros((100, 1))
    np.testing.assert_allclose(q_sample(s, one, t, zero)[:, 0], mean[1:], rtol=1e-6)
    np.testing.assert_allclose(q_sample(s, zero, t, one)[:, 0] ** 2, variance[1:], rtol=1e-5)


@pytest.mark.parametrize("s", SCHEDULES)
@pytest.mark.parametrize("t", [1, 60, 98])
def test_posterior_is_bayes_rule_on_a_grid(s: schedules.Schedule, t: int) -> None:
    x_0, x_t = 0.4, -0.7
    grid = np.linspace(-8, 8, 400_001)  # of x_{t-1}
    log_p = -((x_t - np.sqrt(s.alpha[t]) * grid) ** 2) / (2 * s.beta[t])
    log_p -= (grid - s.sqrt_alpha_bar[t - 1] * x_0) ** 2 / (2 * (1 - s.alpha_bar[t - 1]))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * grid).sum()
    variance = (p * (grid - mean) ** 2).sum()
    got = q_posterior(s, jnp.full((1, 1), x_0), jnp.full((1, 1), x_t), jnp.array([t]))
    np.testing.assert_allclose(
        [float(g[0, 0]) for g in got], [mean, variance, np.log(variance)], rtol=2e-5, atol=1e-6
    )


def test_posterior_at_zero_is_x_0_itself() -> None:
    x_0, x_t = draw((2, 3))
    mean, variance, _ = q_posterior(SCHEDULES[0], x_0, x_t, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(mean, x_0, rtol=1e-6)
    np.testing.assert_array_equal(variance, 0)


@pytest.mark.parametrize("s", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trips(s: schedules.Schedule, shape: tuple[int, ...]) -> None:
    x_0, eps = draw(shape)
    x_t = q_sample(s, x_0, T, eps)
    v = v_from(s, x_0, eps, T)
    # atol of x_0 from eps: float32 noise in x_t is divided by sqrt(abar), 0.03 at t = 97.
    np.testing.assert_allclose(x_0_from_eps(s, x_t, eps, T), x_0, atol=5e-5)
    np.testing.assert_allclose(eps_from_x_0(s, x_t, x_0, T), eps, atol=5e-5)
    np.testing.assert_allclose(x_0_from_v(s, x_t, v, T), x_0, atol=1e-5)
    np.testing.assert_allclose(eps_from_v(s, x_t, v, T), eps, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_v_is_the_rotation_of_x_0_and_eps(shape: tuple[int, ...]) -> None:
    s = SCHEDULES[0]
    x_0, eps = draw(shape)
    x_t, v = q_sample(s, x_0, T, eps), v_from(s, x_0, eps, T)
    np.testing.assert_allclose(x_t**2 + v**2, x_0**2 + eps**2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", gaussian.KINDS)
def test_a_perfect_network_of_any_kind_says_the_same(kind: str, shape: tuple[int, ...]) -> None:
    s = SCHEDULES[1]
    x_0, eps = draw(shape)
    x_t = q_sample(s, x_0, T, eps)
    out = {"eps": eps, "x_0": x_0, "v": v_from(s, x_0, eps, T)}[kind]
    pred = to_prediction(s, kind, out, x_t, T)
    np.testing.assert_allclose(pred.x_0, x_0, atol=1e-4)
    np.testing.assert_allclose(pred.eps, eps, atol=1e-4)
    assert pred.log_variance is None


@pytest.mark.parametrize("kind", gaussian.KINDS)
@pytest.mark.parametrize("clip", [None, ("static", 0.5), ("dynamic", 90.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_x_0_and_eps_agree_with_x_t_whatever_the_clip(
    kind: str, clip: gaussian.Clip, shape: tuple[int, ...]
) -> None:
    s = SCHEDULES[1]
    out, x_t = draw(shape)
    pred = to_prediction(s, kind, 3 * out, x_t, T, clip)
    np.testing.assert_allclose(q_sample(s, pred.x_0, T, pred.eps), x_t, atol=1e-4)
    if clip is not None:
        assert jnp.abs(pred.x_0).max() <= (0.5 if clip[0] == "static" else 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_variance_runs_from_beta_tilde_to_beta(shape: tuple[int, ...]) -> None:
    s = SCHEDULES[0]
    x_0, x_t = draw(shape)
    bounds = {-1.0: s.posterior_log_variance_clipped, 1.0: np.log(s.beta)}
    bounds[0.0] = (bounds[-1.0] + bounds[1.0]) / 2
    for raw, table in bounds.items():
        out = jnp.concatenate([x_0, jnp.full(shape, raw)], axis=-1)
        pred = to_prediction(s, "x_0", out, x_t, T, None, True)
        expected = table[np.asarray(T)].reshape(5, *[1] * (len(shape) - 1))
        np.testing.assert_allclose(pred.log_variance, np.broadcast_to(expected, shape), rtol=1e-5)
        np.testing.assert_array_equal(pred.x_0, x_0)


def test_a_scalar_t_serves_the_whole_batch() -> None:
    s = SCHEDULES[0]
    out, x_t = draw((3, 2, 2, 1))
    one = to_prediction(s, "v", out, x_t, jnp.int32(7))
    many = to_prediction(s, "v", out, x_t, jnp.full(3, 7))
    np.testing.assert_allclose(one.x_0, many.x_0, rtol=1e-6, atol=1e-6)


def test_bfloat16_outputs_are_promoted() -> None:
    out, x_t = draw((2, 4))
    pred = to_prediction(SCHEDULES[0], "eps", out.astype(jnp.bfloat16), x_t, T[:2])
    assert pred.x_0.dtype == jnp.float32 and pred.eps.dtype == jnp.float32


def test_mistakes_are_named() -> None:
    x = jnp.zeros((2, 4))
    with pytest.raises(UserError, match="eps, x_0, v"):
        gaussian.to_prediction(SCHEDULES[0], "epsilon", x, x, T[:2])
    with pytest.raises(UserError, match="last axis must be 8"):
        gaussian.to_prediction(SCHEDULES[0], "eps", x, x, T[:2], learned_variance=True)
    with pytest.raises(UserError, match="'static' or 'dynamic'"):
        gaussian.to_prediction(SCHEDULES[0], "eps", x, x, T[:2], clip=("statik", 1.0))
