"""Losses by what they must be for networks whose output is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import gaussian, losses, schedules
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.errors import UserError

S = schedules.cosine(100)
T = jnp.array([0, 3, 40, 95])
KEYS = jax.random.split(jax.random.key(0), 3)
X_0 = jnp.round(jax.random.uniform(KEYS[0], (4, 4, 4, 3)) * 255) / 127.5 - 1
NOISE = jax.random.normal(KEYS[1], X_0.shape)
ERROR = jax.random.normal(KEYS[2], X_0.shape)


log_likelihood = jax.jit(losses.discretised_log_likelihood)
sample_t = jax.jit(losses.sample_t, static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnames=("apply", "kind", "learned", "weight", "by"))
def run(
    apply: Apply, kind: str = "eps", learned: bool = False, weight: float = 0.001, by: str = "none"
) -> dict[str, jax.Array]:
    return losses.training_losses(S, apply, X_0, T, NOISE, kind, learned, weight, by)


def target(kind: str) -> jax.Array:
    return {"eps": NOISE, "x_0": X_0, "v": gaussian.v_from(S, X_0, NOISE, T)}[kind]


def both(mean: jax.Array, raw: float | jax.Array) -> jax.Array:
    return jnp.concatenate([mean, jnp.broadcast_to(raw, mean.shape)], axis=-1)


@pytest.mark.parametrize("kind", gaussian.KINDS)
def test_simple_loss_is_the_mean_squared_error_of_its_kind(kind: str) -> None:
    out = run(lambda x_t, t: target(kind) + ERROR, kind)
    assert set(out) == {"loss", "mse"}
    np.testing.assert_allclose(out["loss"], (ERROR**2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_the_network_is_shown_x_t_and_t() -> None:
    def apply(x_t: jax.Array, t: jax.Array) -> jax.Array:
        np.testing.assert_array_equal(t, T)
        return (x_t - schedules.extract(S.sqrt_alpha_bar, t, 4) * X_0) / schedules.extract(
            S.sqrt_one_minus_alpha_bar, t, 4
        )

    np.testing.assert_allclose(
        losses.training_losses(S, apply, X_0, T, NOISE)["loss"], 0, atol=1e-7
    )


def test_vectors_train_too() -> None:
    x_0, noise = X_0.reshape(4, -1), NOISE.reshape(4, -1)
    out = losses.training_losses(S, lambda x_t, t: 0 * x_t, x_0, T, noise, "x_0")
    np.testing.assert_allclose(out["loss"], (x_0**2).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", gaussian.KINDS)
def test_hybrid_is_simple_plus_the_weighted_bound(kind: str) -> None:
    for weight in (0.001, 0.5):
        out = run(lambda x_t, t: both(target(kind) + 0.1 * ERROR, 0.3), kind, True, weight)
        np.testing.assert_allclose(out["loss"], out["mse"] + weight * 100 * out["vb"], rtol=1e-6)


@pytest.mark.parametrize("kind", gaussian.KINDS)
def test_the_bound_trains_the_variance_and_not_the_mean(kind: str) -> None:
    def sums(params: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        apply = lambda x_t, t: both(target(kind) + params["mean"] * ERROR, params["raw"])  # noqa: E731
        out = losses.training_losses(S, apply, X_0, T, NOISE, kind, True)
        return out["vb"].sum(), out["mse"].sum(), out["loss"].sum()

    params = {"mean": jnp.float32(0.2), "raw": jnp.float32(0.1)}
    vb, mse, loss = jax.jit(jax.jacrev(sums))(params)
    assert vb["mean"] == 0
    assert abs(vb["raw"]) > 1e-4
    assert mse["raw"] == 0
    np.testing.assert_allclose(loss["mean"], mse["mean"], rtol=1e-6)


def test_a_perfect_network_has_no_divergence() -> None:
    out = run(lambda x_t, t: both(NOISE, -1.0), "eps", True)
    np.testing.assert_array_equal(out["mse"], 0)
    np.testing.assert_allclose(out["vb"][1:], 0, atol=1e-5)


def test_divergence_of_a_known_error_in_x_0() -> None:
    # With the posterior's own variance, KL = (c_0 error)^2 / (2 beta~).
    vb = run(lambda x_t, t: both(X_0 + ERROR, -1.0), "x_0", True)["vb"]
    t = np.asarray(T)[1:]
    c = S.posterior_mean_coef_x_0[t] ** 2 / (2 * S.posterior_variance[t]) / np.log(2)
    expected = c * np.square(ERROR).mean(axis=(1, 2, 3))[1:]
    np.testing.assert_allclose(vb[1:], expected, rtol=1e-3)


def test_the_bound_is_never_negative() -> None:
    t = jnp.arange(100)
    k = jax.random.split(jax.random.key(3), 4)
    x_0 = jnp.round(jax.random.uniform(k[0], (100, 2, 2, 3)) * 255) / 127.5 - 1
    noise, out = jax.random.normal(k[1], x_0.shape), jax.random.normal(k[2], x_0.shape)
    raw = jax.random.uniform(k[3], x_0.shape, minval=-1, maxval=1)
    f = jax.jit(losses.training_losses, static_argnums=(0, 1, 5, 6))
    vb = f(S, lambda x_t, t: both(out, raw), x_0, t, noise, "v", True)["vb"]
    assert (vb >= -1e-6).all() and jnp.isfinite(vb).all()


def test_normal_kl_against_numerical_integration() -> None:
    grid = np.linspace(-20, 20, 200_001)
    pdf = lambda m, lv: np.exp(-((grid - m) ** 2) / (2 * np.exp(lv)) - lv / 2)  # noqa: E731
    for m_1, lv_1, m_2, lv_2 in [(0.0, 0.0, 1.0, 0.5), (0.5, -2.0, 0.4, 1.0), (1.0, 1.0, 1.0, 1.0)]:
        p, q = pdf(m_1, lv_1), pdf(m_2, lv_2)
        expected = (p * (np.log(p + 1e-300) - np.log(q + 1e-300))).sum() / p.sum()
        got = losses.normal_kl(*(jnp.float32(v) for v in (m_1, lv_1, m_2, lv_2)))
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.98, 0.05), (-0.5, 2.0), (0.3, 0.004)])
def test_the_256_bins_of_a_pixel_sum_to_one(mean: float, std: float) -> None:
    x = jnp.arange(256) / 127.5 - 1
    full = lambda v: jnp.full(x.shape, v, jnp.float32)  # noqa: E731
    log_p = log_likelihood(x, full(mean), full(2 * math.log(std)))
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, atol=1e-5)
    cdf = lambda v: 0.5 * math.erfc(-(v - mean) / std / math.sqrt(2))  # noqa: E731
    i = round((mean + 1) * 127.5)
    centre = i / 127.5 - 1
    upper = 1.0 if i == 255 else cdf(centre + 1 / 255)
    np.testing.assert_allclose(
        jnp.exp(log_p[i]), upper - cdf(centre - 1 / 255), rtol=1e-4, atol=1e-7
    )


def test_hopeless_guesses_have_finite_loss_and_gradient() -> None:
    def nll(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
        return -losses.discretised_log_likelihood(jnp.float32(-1.0), mean, log_variance)

    value, grads = jax.jit(jax.value_and_grad(nll, (0, 1)))(jnp.float32(40.0), jnp.float32(-12.0))
    assert np.isfinite([value, *grads]).all()


@pytest.mark.parametrize(("weighting", "plus"), [("min_snr_5", 0), ("min_v_5", 1)])
def test_a_weighting_is_one_loss_on_x_0_whatever_the_kind(weighting: str, plus: int) -> None:
    x_0_pred = X_0 + 0.1 * ERROR
    x_t = gaussian.q_sample(S, X_0, T, NOISE)
    eps_pred = gaussian.eps_from_x_0(S, x_t, x_0_pred, T)
    out = {"x_0": x_0_pred, "eps": eps_pred, "v": gaussian.v_from(S, x_0_pred, eps_pred, T)}
    weighted = [run(lambda x_t, t, k=k: out[k], k, by=weighting)["loss"] for k in gaussian.KINDS]
    snr = np.exp(S.logsnr)[np.asarray(T)]
    expected = np.minimum(snr + plus, 5) * 0.01 * np.square(ERROR).mean(axis=(1, 2, 3))
    for loss in weighted:
        np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_min_v_unbounded_is_the_plain_loss_on_v() -> None:
    unbounded = 10 * np.exp(S.logsnr).max()
    np.testing.assert_allclose(losses.loss_weight(S, "v", f"min_v_{unbounded:.0f}"), 1, rtol=1e-6)
    assert losses.loss_weight(S, "x_0", "min_v_20").min() >= 1 - 1e-6  # float32


@pytest.mark.parametrize("weighting", ["minsnr", "min_snr", "min_v_0", "min_v_0.0", "min_v_²"])
def test_an_unknown_weighting_is_refused(weighting: str) -> None:
    with pytest.raises(UserError, match="min_snr_<gamma>"):
        losses.loss_weight(S, "eps", weighting)


def test_t_is_uniform_and_strata_cover_time() -> None:
    t = sample_t(jax.random.key(1), 20_000, 10)
    counts = np.bincount(t, minlength=10)
    assert t.dtype == jnp.int32 and counts.min() > 1800 and counts.max() < 2200
    t = sample_t(jax.random.key(2), 40, 1000, True)
    np.testing.assert_array_equal(np.sort(np.asarray(t) // 25), np.arange(40))
    assert (np.diff(t) < 0).any()
    many = jax.vmap(lambda k: sample_t(k, 4, 10, True))(jax.random.split(jax.random.key(3), 5000))
    counts = np.bincount(np.ravel(many[:, 0]), minlength=10)
    assert counts.min() > 400 and counts.max() < 600
