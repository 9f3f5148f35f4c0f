"""Guidance by its identities, thresholding by known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    np.testing.assert_allclose(guidance.static_threshold(x), [[-1, -0.5, 0, 0.9, 1]])
    np.testing.assert_allclose(guidance.static_threshold(x, 5.0), [[-2, -0.5, 0, 0.9, 5]])


def test_dynamic_threshold_known_values() -> None:
    # |x| sorted 0 1 2 3 4: the 75th percentile is 3, the 100th 4, the 25th 1.
    x = jnp.array([[0.0, -1.0, 2.0, -3.0, 4.0]])
    np.testing.assert_allclose(
        guidance.dynamic_threshold(x, 75.0), [[0, -1 / 3, 2 / 3, -1, 1]], rtol=1e-6
    )
    np.testing.assert_allclose(guidance.dynamic_threshold(x, 100.0), x / 4, rtol=1e-6)
    np.testing.assert_allclose(guidance.dynamic_threshold(x, 25.0), [[0, -1, 1, -1, 1]])


def test_dynamic_threshold_leaves_small_values_and_other_examples_alone() -> None:
    x = jnp.stack([jnp.linspace(-0.9, 0.9, 16), jnp.linspace(-5, 5, 16)]).reshape(2, 2, 2, 4)
    out = guidance.dynamic_threshold(x, 99.5)
    np.testing.assert_array_equal(out[0], x[0])
    s = np.percentile(np.abs(x[1]), 99.5)
    np.testing.assert_allclose(out[1], np.clip(x[1], -s, s) / s, rtol=1e-6)


def test_a_fraction_for_a_percentile_is_refused() -> None:
    with pytest.raises(UserError, match=r"percentile 0\.995"):
        guidance.dynamic_threshold(jnp.zeros((1, 4)), 0.995)
