"""The diffusion prior: what it sees, and Karlo's count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cascade import CONTEXT, DIM, WIDTH, random_params

from dalle2_jax.nets.prior import DiffusionPrior

MODEL = dict(dim=DIM, context_length=CONTEXT, width=WIDTH, depth=1, heads=2)
B = 2


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


INPUTS = dict(
    x_t=normal(0, B, DIM),
    t=jnp.asarray([1, 900], jnp.int32),
    z_txt=normal(1, B, DIM),
    txt_enc=normal(2, B, CONTEXT, WIDTH),
    txt_mask=jnp.arange(CONTEXT)[None] < jnp.asarray([[3], [CONTEXT]]),
)


def started(network):
    return random_params(lambda key: network.init(key, **INPUTS))


@pytest.fixture(scope="module")
def model():
    network = DiffusionPrior(**MODEL)
    apply = jax.jit(network.apply)
    return (lambda params, **change: apply(params, **(INPUTS | change))), started(network)


def far(a, b) -> bool:
    return bool((jnp.abs(a - b).max(axis=1) > 1e-3).all())


@pytest.mark.parametrize("name", ["x_t", "t", "z_txt", "txt_enc"])
def test_every_input_matters(model, name):
    run, params = model
    out = run(params)
    assert out.shape == (B, DIM) and out.dtype == jnp.float32
    other = INPUTS[name] + 50 if name == "t" else -INPUTS[name]
    assert far(run(params, **{name: other}), out)


def test_padding_is_not_seen(model):
    run, params = model
    other = jnp.where(INPUTS["txt_mask"][..., None], INPUTS["txt_enc"], 5.0)
    np.testing.assert_allclose(run(params, txt_enc=other), run(params), rtol=1e-5, atol=1e-5)


def test_without_a_caption_neither_tokens_nor_z_txt_matter(model):
    run, params = model
    none = {"txt_mask": jnp.zeros((B, CONTEXT), bool)}
    other = {"txt_enc": normal(5, B, CONTEXT, WIDTH), "z_txt": normal(6, B, DIM)}
    np.testing.assert_allclose(run(params, **none, **other), run(params, **none), atol=1e-6)
    assert far(run(params, **none), run(params))


def test_karlos_null_is_what_the_caller_gives():
    network = DiffusionPrior(**MODEL, learned_null=False)
    params = started(network)
    assert "null_z_txt" not in params["params"]
    none = INPUTS | {"txt_mask": jnp.zeros((B, CONTEXT), bool)}
    run = jax.jit(network.apply)
    assert far(run(params, **none), run(params, **(none | {"z_txt": normal(6, B, DIM)})))


def test_every_parameter_has_a_gradient(model):
    run, params = model
    mask = INPUTS["txt_mask"] & jnp.asarray([[False], [True]])

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.square(run(p, txt_mask=mask) - 1.0).mean())(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path)
        if "['k']['bias']" not in name:  # the same for all keys: softmax does not see it
            assert jnp.abs(g).max() > 0, name


def test_bfloat16_is_near_and_gives_float32(model):
    run, params = model
    out = jax.jit(DiffusionPrior(**MODEL, dtype=jnp.bfloat16).apply)(params, **INPUTS)
    assert out.dtype == jnp.float32
    assert jnp.abs(out - run(params)).max() < 0.1 * jnp.abs(run(params)).max()


def test_count_of_karlos_prior():
    """1,022,028,544 without its two statistics of 768: 20 layers of 2048 over 77 + 4 tokens."""
    network = DiffusionPrior(
        dim=768, context_length=77, width=2048, depth=20, heads=32, learned_null=False
    )
    z, t = jnp.zeros((1, 768)), jnp.zeros((1,), jnp.int32)
    mask = jnp.ones((1, 77), bool)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), z, t, z, jnp.zeros((1, 77, 768)), mask)
    )
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 1_022_028_544
