"""The autoregressive prior: what each place sees, decoding with a cache, codes and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cascade import CONTEXT, DIM, WIDTH, random_params

from dalle2_jax.nets.ar_prior import ARPrior, Statistics

DIMS, BUCKETS, B = 6, 11, 3
MODEL = dict(dim=DIM, context_length=CONTEXT, width=WIDTH, depth=2, heads=2)
NETWORK = ARPrior(**MODEL, dims=DIMS, buckets=BUCKETS)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


TEXT = dict(
    z_txt=normal(1, B, DIM),
    txt_enc=normal(2, B, CONTEXT, WIDTH),
    txt_mask=jnp.arange(CONTEXT)[None] < jnp.asarray([[3], [CONTEXT], [0]]),
)
CODES = jnp.asarray(np.random.default_rng(3).integers(0, BUCKETS, (B, 1 + DIMS)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(lambda key: NETWORK.init(key, normal(0, B, DIM), **TEXT), std=0.3)


@pytest.fixture(scope="module")
def logits(params):
    run = jax.jit(lambda codes, **text: NETWORK.apply(params, codes, method="logits", **text))
    return lambda codes=CODES, **change: np.asarray(run(codes, **(TEXT | change)))


def test_decoding_with_a_cache_is_the_causal_pass(params, logits):
    """Also of a row without a caption, and of one whose padding lies between."""
    first, past = NETWORK.apply(params, *TEXT.values(), method="prefill")
    found = [first]
    step = jax.jit(lambda *x: NETWORK.apply(params, *x, method="step"))
    for place in range(DIMS):
        one, past = step(CODES[:, place], jnp.int32(place), past)
        found.append(one)
    np.testing.assert_allclose(np.stack(found, axis=1), logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(1 + DIMS))
def test_a_place_sees_the_codes_before_it_alone(logits, place):
    other = logits(CODES.at[:, place].set((CODES[:, place] + 5) % BUCKETS))
    np.testing.assert_array_equal(other[:, : place + 1], logits()[:, : place + 1])
    moved = np.abs(other - logits())[:, place + 1 :].max(axis=(0, 2), initial=0)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("name", ["z_txt", "txt_enc"])
def test_every_place_sees_the_caption(logits, name):
    moved = np.abs(logits(**{name: -TEXT[name]}) - logits()).max(axis=2)
    assert (moved[:2] > 1e-4).all() and (moved[2] == 0).all()  # the last row has no caption


def test_padding_is_not_seen(logits):
    other = jnp.where(TEXT["txt_mask"][..., None], TEXT["txt_enc"], 5.0)
    np.testing.assert_allclose(logits(txt_enc=other), logits(), rtol=1e-5, atol=1e-5)


def test_a_shorter_context_is_the_same_but_for_its_padding(logits):
    short = {"txt_enc": TEXT["txt_enc"][:, :3], "txt_mask": TEXT["txt_mask"][:, :3]}
    np.testing.assert_allclose(logits(**short)[0], logits()[0], rtol=1e-4, atol=1e-5)


def test_the_call_gives_codes_and_their_logits(params, logits):
    given = normal(0, B, DIM)
    out, codes = NETWORK.apply(params, given, **TEXT)
    want = NETWORK.apply(params, given, TEXT["z_txt"], method="codes")
    np.testing.assert_array_equal(codes, want)
    assert out.dtype == jnp.float32 and codes.shape == (B, 1 + DIMS)
    np.testing.assert_allclose(out, logits(codes), rtol=1e-5, atol=1e-5)


def test_logits_are_never_rounded_to_bfloat16(params):
    """A cross entropy of many buckets sees it."""
    network = NETWORK.clone(dtype=jnp.bfloat16)
    params = {"params": params["params"] | {"bias": jnp.zeros((1 + DIMS, BUCKETS))}}
    whole = network.apply(params, CODES, **TEXT, method="logits")
    first, past = network.apply(params, *TEXT.values(), method="prefill")
    one, _ = network.apply(params, CODES[:, 0], jnp.int32(0), past, method="step")
    for found in (whole, first, one):
        assert found.dtype == jnp.float32
        assert (found == found.astype(jnp.bfloat16)).mean() < 0.1


def test_all_but_the_statistics_has_a_gradient(params):
    weights = normal(5, B, 1 + DIMS, BUCKETS)

    @jax.jit
    def gradient(p):
        return jax.grad(lambda p: (NETWORK.apply(p, normal(0, B, DIM), **TEXT)[0] * weights).sum())(
            p
        )

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)["params"]):
        name = jax.tree_util.keystr(path)
        if "['k']['bias']" not in name:  # the same for all keys: softmax does not see it
            assert (jnp.abs(g).max() > 0) == ("statistics" not in name), name


def fitted(dims: int, buckets: int, z: np.ndarray, z_txt: np.ndarray):
    """Statistics by numpy's SVD."""
    mean = z.mean(axis=0)
    components = np.linalg.svd(z - mean, full_matrices=False)[2][:dims]
    values = np.concatenate([(z * z_txt).sum(1, keepdims=True), (z - mean) @ components.T], 1)
    given = dict(mean=mean, components=components, low=values.min(0), high=values.max(0))
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)
    network = Statistics(z.shape[1], dims, buckets)
    return lambda *x, method: np.asarray(network.apply({"params": given}, *x, method=method))


def unit(seed, n, d):
    z = np.random.default_rng(seed).standard_normal((n, d)) * np.linspace(3, 0.1, d) + 0.5
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def test_the_round_trip_errs_by_what_buckets_must():
    """All directions kept: uniform within a bucket of width w the mean square error is w^2 / 12."""
    z, z_txt = unit(0, 4000, 12), unit(1, 4000, 12)
    errors = []
    for buckets in (64, 1024):
        run = fitted(12, buckets, z, z_txt)
        codes = run(z, z_txt, method="codes")
        assert codes.min() == 0 and codes.max() == buckets - 1 and codes.dtype == np.int32
        values = run(z, z_txt, method="values")
        width = (values.max(0) - values.min(0)) / buckets
        error = run(codes, method="z_img") - z
        assert np.square(error).sum(1).mean() == pytest.approx((width[1:] ** 2).sum() / 12, rel=0.1)
        assert np.abs(error).max() < width[1:].sum()
        errors.append(np.square(error).sum(1).mean())
        again = run(run(codes, method="z_img"), z_txt, method="codes")
        np.testing.assert_array_equal(again[:, 1:], codes[:, 1:])
    assert errors[1] == pytest.approx(errors[0] / 256, rel=0.1)


def test_code_0_is_the_dot_product_and_rises_with_it():
    z, z_txt = unit(0, 500, 12), unit(1, 500, 12)
    run = fitted(4, 32, z, z_txt)
    dot = (z * z_txt).sum(axis=1)
    codes = run(z, z_txt, method="codes")[:, 0]
    low, high = dot.min(), dot.max()
    # Half a bucket at most, and rounding.
    half = (high - low) / 32 / 2
    np.testing.assert_allclose((codes + 0.5) / 32 * (high - low) + low, dot, atol=half + 1e-5)


def test_what_is_out_of_range_takes_the_last_bucket():
    z, z_txt = unit(0, 100, 12), unit(1, 100, 12)
    run = fitted(4, 32, z, z_txt)
    far = run(100 * z, z_txt, method="codes")
    assert far.min() == 0 and far.max() == 31
