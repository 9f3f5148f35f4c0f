"""Guidance by its identities, thresholding by known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import EPS

from dalle2_jax.diffusion import gaussian, guidance, schedules
from dalle2_jax.errors import UserError

KEYS = jax.random.split(jax.random.key(0), 2)
COND, UNCOND = (jax.random.normal(k, (3, 4, 4, 6)) for k in KEYS)


def test_one_is_the_condition_and_zero_its_absence() -> None:
    np.testing.assert_allclose(guidance.guided(COND, UNCOND, 1.0), COND, atol=1e-6)
    np.testing.assert_array_equal(guidance.guided(COND, UNCOND, 0.0), UNCOND)
    np.testing.assert_allclose(guidance.guided(COND, UNCOND, 3.0), 3 * COND - 2 * UNCOND, atol=1e-5)


def test_equal_branches_do_not_feel_the_scale() -> None:
    np.testing.assert_array_equal(guidance.guided(COND, COND, 7.5), COND)


def test_learned_variance_is_the_conditional_one() -> None:
    out = guidance.guided(COND, UNCOND, 4.0, learned_variance=True)
    np.testing.assert_array_equal(out[..., 3:], COND[..., 3:])
    expected = guidance.guided(COND[..., :3], UNCOND[..., :3], 4.0)
    np.testing.assert_array_equal(out[..., :3], expected)


def test_a_scale_for_every_example() -> None:
    w = jnp.array([0.0, 1.0, 2.5])
    out = guidance.guided(COND, UNCOND, w)
    for i in range(3):
        expected = guidance.guided(COND[i : i + 1], UNCOND[i : i + 1], w[i])
        np.testing.assert_allclose(out[i : i + 1], expected, rtol=1e-6)


def test_guiding_eps_x_0_or_v_is_the_same() -> None:
    s = schedules.cosine(100)
    t = jnp.array([5, 40, 80])
    x_t, a, b = (jax.random.normal(k, (3, 8)) for k in jax.random.split(jax.random.key(1), 3))
    x_0_pred = [gaussian.x_0_from_eps(s, x_t, eps, t) for eps in (a, b)]
    v_pred = [gaussian.v_from(s, x_0, eps, t) for x_0, eps in zip(x_0_pred, (a, b), strict=True)]
    eps = guidance.guided(a, b, 2.0)
    from_x_0 = gaussian.eps_from_x_0(s, x_t, guidance.guided(*x_0_pred, 2.0), t)
    from_v = gaussian.eps_from_v(s, x_t, guidance.guided(*v_pred, 2.0), t)
    np.testing.assert_allclose(from_x_0, eps, atol=1e-4)
    np.testing.assert_allclose(from_v, eps, atol=1e-4)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_guide_is_one_doubled_batch(learned_variance: bool) -> None:
    seen = []

    def apply(x_t: jax.Array, t: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
        seen.append(x_t.shape[0])
        shift = cond["z"][:, None, None, :] + t[:, None, None, None]
        return jnp.concatenate([x_t * shift, x_t - shift], axis=-1)

    x_t, t = COND[..., :3], jnp.array([1, 2, 3])
    cond, uncond = {"z": jnp.ones((3, 3))}, {"z": jnp.zeros((3, 3))}
    out = guidance.guide(apply, cond, uncond, 2.0, learned_variance)(x_t, t)
    assert seen == [6]
    expected = guidance.guided(
        apply(x_t, t, cond), apply(x_t, t, uncond), 2.0, learned_variance=learned_variance
    )
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    seen.clear()
    alone = guidance.guide(apply, cond, uncond, 1.0, learned_variance)(x_t, t)
    assert seen == [3]
    np.testing.assert_array_equal(alone, apply(x_t, t, cond))


def test_static_threshold() -> None:
    x = jnp.array([[-2.0, -0.5, 0.0, 0.9, 7.0]])
    np.testing.assert_allclose(guidance.static_threshold(x), [[-1, -0.5, 0, 0.9, 1]], rtol=EPS)
    np.testing.assert_allclose(guidance.static_threshold(x, 5.0), [[-2, -0.5, 0, 0.9, 5]], rtol=EPS)


def test_dynamic_threshold_known_values() -> None:
    # |x| sorted 0 1 2 3 4: the 75th percentile is 3, the 100th 4, the 25th 1.
    x = jnp.array([[0.0, -1.0, 2.0, -3.0, 4.0]])
    np.testing.assert_allclose(
        guidance.dynamic_threshold(x, 75.0), [[0, -1 / 3, 2 / 3, -1, 1]], rtol=1e-6
    )
    np.testing.assert_allclose(guidance.dynamic_threshold(x, 100.0), x / 4, rtol=1e-6)
    np.testing.assert_allclose(
        guidance.dynamic_threshold(x, 25.0), [[0, -1, 1, -1, 1]], rtol=4 * EPS
    )


def test_dynamic_threshold_leaves_small_values_and_other_examples_alone() -> None:
    x = jnp.stack([jnp.linspace(-0.9, 0.9, 16), jnp.linspace(-5, 5, 16)]).reshape(2, 2, 2, 4)
    out = guidance.dynamic_threshold(x, 99.5)
    np.testing.assert_array_equal(out[0], x[0])
    s = np.percentile(np.abs(x[1]), 99.5)
    np.testing.assert_allclose(out[1], np.clip(x[1], -s, s) / s, rtol=1e-6)


def test_a_fraction_for_a_percentile_is_refused() -> None:
    with pytest.raises(UserError, match=r"percentile 0\.995"):
        guidance.dynamic_threshold(jnp.zeros((1, 4)), 0.995)


def test_rescaling_gives_the_condition_its_spread_back() -> None:
    """2305.08891 section 3.4: at phi = 1 the standard deviation of an example is cond's."""
    w, axes = 6.0, (1, 2, 3)
    plain = np.asarray(guidance.guided(COND, UNCOND, w))
    full = np.asarray(guidance.guided(COND, UNCOND, w, rescale=1.0))
    np.testing.assert_allclose(full.std(axes), np.asarray(COND).std(axes), rtol=1e-5)
    assert (plain.std(axes) > 3 * full.std(axes)).all()
    ratio = full / plain  # one factor an example, of its own
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-5)
    assert np.ptp(ratio[:, 0, 0, 0]) > 1e-4
    part = guidance.guided(COND, UNCOND, w, rescale=0.7)
    np.testing.assert_allclose(part, 0.7 * full + 0.3 * plain, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(guidance.guided(COND, UNCOND, w, rescale=0.0), plain)
    assert np.isfinite(guidance.guided(0 * COND, 0 * COND, w, rescale=1.0)).all()


def test_rescaling_neither_reads_nor_touches_a_learned_variance() -> None:
    out = guidance.guided(COND, UNCOND, 4.0, learned_variance=True, rescale=0.7)
    np.testing.assert_array_equal(out[..., 3:], COND[..., 3:])
    expected = guidance.guided(COND[..., :3], UNCOND[..., :3], 4.0, rescale=0.7)
    np.testing.assert_array_equal(out[..., :3], expected)
    louder = COND.at[..., 3:].multiply(9.0)
    again = guidance.guided(louder, UNCOND, 4.0, learned_variance=True, rescale=0.7)
    np.testing.assert_array_equal(again[..., :3], out[..., :3])


def test_an_interval_is_open_below_and_closed_above() -> None:
    # sigma / alpha = 1/2, 1, 2 at abar = 4/5, 1/2, 1/5
    s = schedules.Schedule(np.array([0.8, 0.5, 0.2]), np.arange(3))
    level = np.exp(-0.5 * s.logsnr)
    np.testing.assert_allclose(level, [0.5, 1, 2])
    assert guidance.within(s, (level[0], level[1])).tolist() == [False, True, False]
    assert guidance.within(s, (0.0, 1.5)).tolist() == [True, True, False]
    assert guidance.within(s, (0.0, 1e9)).all()


@pytest.mark.parametrize("learned_variance", [False, True])
def test_outside_the_interval_the_condition_runs_alone(learned_variance: bool) -> None:
    rows = []

    def apply(x_t: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: rows.append(x_t.shape[0]))
        shift = cond[:, None, None, None] + t[:, None, None, None]
        return jnp.concatenate([x_t * shift, x_t - shift], axis=-1)

    x_t, cond, uncond = COND[..., :3], jnp.ones(3), jnp.zeros(3)
    where = np.array([False, True, True, False])
    everywhere = guidance.guide(apply, cond, uncond, 2.5, learned_variance, 0.3)
    limited = guidance.guide(apply, cond, uncond, 2.5, learned_variance, 0.3, where)
    for t in range(4):
        ts = jnp.full(3, t)
        expected = everywhere(x_t, ts) if where[t] else apply(x_t, ts, cond)
        jax.effects_barrier()
        rows.clear()
        np.testing.assert_allclose(jax.jit(limited)(x_t, ts), expected, rtol=1e-6)
        jax.effects_barrier()
        assert rows == [6 if where[t] else 3]
