"""Drawing codes: rows, guidance, the top of a distribution, and the same codes as step by step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_cascade import CONTEXT, DIM, WIDTH, random_params

from dalle2_jax.errors import UserError
from dalle2_jax.nets.ar_prior import ARPrior
from dalle2_jax.nets.clip import TextEncoding
from dalle2_jax.sampling.ar_prior import (
    ARPriorSampler,
    Settings,
    nucleus,
    sample_codes,
    top_share,
)
from dalle2_jax.sampling.prior import nearest_to
from dalle2_jax.sampling.stage import finish

DIMS, BUCKETS, B = 5, 9, 3
NETWORK = ARPrior(
    dim=DIM,
    context_length=CONTEXT,
    width=WIDTH,
    depth=1,
    heads=2,
    dims=DIMS,
    buckets=BUCKETS,
)
RNG = np.random.default_rng(0)
TEXT = TextEncoding(
    z_txt=jnp.asarray(np.linalg.qr(RNG.standard_normal((DIM, DIM)))[0][:B], jnp.float32),
    txt_enc=jnp.asarray(RNG.standard_normal((B, CONTEXT, WIDTH)), jnp.float32),
    txt_mask=jnp.arange(CONTEXT)[None] < jnp.asarray([[3], [CONTEXT], [5]]),
)
KEY_DATA = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), B)))


def keys(rows=slice(None)):
    """Typed keys, new ones every time: no key is used twice."""
    return jax.random.wrap_key_data(jnp.asarray(KEY_DATA[rows]))


@pytest.fixture(scope="module")
def params():
    z_img = jnp.zeros((B, DIM))
    return random_params(lambda key: NETWORK.init(key, z_img, *TEXT)["params"], std=0.3)


def sampler(candidates=1, **settings) -> ARPriorSampler:
    return ARPriorSampler(NETWORK, Settings(**settings), candidates)


codes_of = jax.jit(sample_codes, static_argnums=0)


def cond_of(rows=slice(None), text=TEXT):
    return jax.tree.map(lambda x: x[rows], text._asdict())


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 3.0, "top_p": 0.7}])
def test_a_row_depends_on_its_own_key_and_caption_alone(params, settings):
    made = sampler(candidates=2, **settings)
    whole = np.asarray(finish(made(params, cond_of(), keys())))
    assert whole.shape == (B, DIM)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    rows = [slice(i, i + 1) for i in range(B)]
    alone = [finish(made(params, cond_of(row), keys(row)))[0] for row in rows]
    np.testing.assert_allclose(np.stack(alone), whole, rtol=1e-4, atol=1e-5)
    turn = slice(None, None, -1)
    turned = np.asarray(finish(made(params, cond_of(turn), keys(turn))))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(finish(made(params, cond_of(), keys())), whole)
    other = finish(made(params, cond_of(), keys(turn)))
    assert np.abs(other - whole)[0].max() > 1e-3


def test_the_likeliest_codes_are_those_of_the_causal_pass(params):
    """At temperature 0 each code is the argmax of the uncached logits, given those before it."""
    codes = codes_of(sampler(temperature=0.0), params, cond_of(), keys())
    apply = functools.partial(NETWORK.apply, {"params": params}, method="logits")
    np.testing.assert_array_equal(apply(codes, *TEXT).argmax(-1)[:, 1:], codes[:, 1:])
    guided = codes_of(sampler(temperature=0.0, cfg_scale=4.0), params, cond_of(), keys())
    null = TEXT._replace(txt_mask=jnp.zeros_like(TEXT.txt_mask))
    told, none = (jax.nn.log_softmax(apply(guided, *text)) for text in (TEXT, null))
    np.testing.assert_array_equal((none + 4 * (told - none)).argmax(-1)[:, 1:], guided[:, 1:])
    assert (guided != codes).any()


def test_codes_are_drawn_as_often_as_they_are_likely(params):
    """Of 4,000 rows: the dot product from the top half of what is predicted, then the first code by
    what is predicted after it."""
    n = 4000
    one = jax.tree.map(lambda x: jnp.repeat(x[:1], n, axis=0), TEXT)
    codes = codes_of(sampler(), params, one._asdict(), jax.random.split(jax.random.key(3), n))
    logits = NETWORK.apply({"params": params}, codes, *one, method="logits")
    p = np.asarray(jax.nn.softmax(logits[0, 0]))
    above = 1 - np.cumsum(p)
    want = np.minimum(p, np.maximum(0.5 - above, 0)) / 0.5
    found = np.bincount(codes[:, 0], minlength=BUCKETS) / n
    np.testing.assert_allclose(found, want, atol=0.03)
    dot = int(np.argmax(found))
    rows = np.flatnonzero(codes[:, 0] == dot)
    found = np.bincount(codes[rows, 1], minlength=BUCKETS) / len(rows)
    np.testing.assert_allclose(found, jax.nn.softmax(logits[rows[0], 1]), atol=0.06)


def test_the_top_half_is_what_lies_above_the_median():
    p = jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]])
    found = jax.nn.softmax(top_share(jnp.log(p), 0.5))
    want = [[0, 0, 0.2, 0.8], [0.4, 0.2, 0.2, 0.2], [0, 0, 0, 1]]
    np.testing.assert_allclose(found, want, atol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(top_share(jnp.log(p), 1.0)), p, atol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(top_share(jnp.log(p), 0.1))[:2, 3], 1, atol=1e-5)


def test_the_nucleus_is_the_fewest_likeliest():
    p = jnp.asarray([[0.1, 0.5, 0.15, 0.25]])
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        found = np.asarray(jax.nn.softmax(nucleus(jnp.log(p), top_p)))[0]
        assert np.flatnonzero(found).tolist() == kept
        np.testing.assert_allclose(
            found[kept], p[0, jnp.asarray(kept)] / p[0, jnp.asarray(kept)].sum(), rtol=1e-5
        )


def test_what_was_learned_is_drawn():
    """Three captions with a z_img each, learned by heart: drawing gives their codes, and with them
    z_img to within a bucket; without a caption it gives one of the three."""
    z_img = jnp.asarray(np.linalg.qr(RNG.standard_normal((DIM, DIM)))[0][:B], jnp.float32)
    params = jax.jit(NETWORK.init)(jax.random.key(0), z_img, *TEXT)["params"]
    tx = optax.adam(1e-2)

    def loss(params, keep):
        text = TEXT._replace(txt_mask=TEXT.txt_mask & keep[:, None])
        logits, codes = NETWORK.apply({"params": params}, z_img, *text)
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            keep = jax.random.uniform(key, (B,)) >= 0.2
            updates, state = tx.update(jax.grad(loss)(params, keep), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 300))[0][0]

    params = train(params, jax.random.key(1))
    codes = NETWORK.apply({"params": params}, z_img, TEXT.z_txt, method="codes")
    np.testing.assert_array_equal(codes_of(sampler(), params, cond_of(), keys()), codes)
    drawn = NETWORK.apply({"params": params}, codes, method="to_z_img")
    assert np.abs(drawn - z_img)[:, :DIMS].max() <= 1 / BUCKETS + 1e-6  # half a bucket of [-1, 1]
    none = TEXT._replace(txt_mask=jnp.zeros_like(TEXT.txt_mask))
    found = codes_of(sampler(top_p=0.9), params, none._asdict(), keys())
    assert all(any(np.array_equal(row, code) for code in codes) for row in found)


def test_a_low_temperature_comes_near_the_likeliest(params):
    likeliest = codes_of(sampler(temperature=0.0, dot_share=1e-5), params, cond_of(), keys())
    near = codes_of(sampler(temperature=1e-4, dot_share=1e-5), params, cond_of(), keys())
    np.testing.assert_array_equal(near, likeliest)
    assert (likeliest[:, 0] == BUCKETS - 1).all()  # the highest dot product there is


def test_of_two_candidates_the_nearer_to_the_caption_is_kept(params):
    z = jnp.asarray(RNG.standard_normal((B * 4, DIM)), jnp.float32)
    best = np.asarray(nearest_to(TEXT.z_txt, z, unit_length=False))
    each = np.asarray(z).reshape(B, 4, DIM)
    cosines = np.einsum(
        "bkd,bd->bk", each / np.linalg.norm(each, axis=2, keepdims=True), TEXT.z_txt
    )
    np.testing.assert_array_equal(best, each[np.arange(B), cosines.argmax(1)])
    near = [
        (finish(sampler(candidates=k)(params, cond_of(), keys())) * TEXT.z_txt).sum()
        for k in (1, 2, 16)
    ]
    assert near[2] > near[0]


def test_progress_moves_once_and_changes_nothing(params):
    seen = []
    made = sampler()
    out = finish(made(params, cond_of(), keys()), lambda *x: seen.append(x))
    assert seen == [(0, DIMS), (DIMS, DIMS)]
    np.testing.assert_array_equal(out, finish(made(params, cond_of(), keys())))
    assert made == sampler() and hash(made) == hash(sampler())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("dot_share", 0),
        ("dot_share", "half"),
        ("cfg_scale", float("nan")),
        ("temperature", True),
        ("cfg_scale", None),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name} must be a (finite )?number.*, not") as error:
        dataclasses.replace(Settings(), **{name: value})
    assert "\n" not in str(error.value)
