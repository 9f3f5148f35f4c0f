"""The U-Nets: what of their condition reaches the image, gradients, sizes, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cascade import CONFIGS, CONTEXT, DIM, UNET, VOCAB, WIDTH, batch, random_params

from dalle2_jax.nets.clip import text_mask
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.upsampler import Upsampler

UNET_WITH_ATTENTION = CONFIGS["decoder"]["model"]["unet"]
TEXT = dict(context_length=CONTEXT, vocab_size=VOCAB, width=WIDTH, depth=1, heads=2)
B = 2


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X_T, T = normal(0, B, 8, 8, 3), jnp.asarray([3, 700], jnp.int32)
COND = dict(
    z_img=normal(1, B, DIM) / DIM**0.5,
    z_mask=jnp.ones((B,), bool),
    tokens=batch(B)["tokens"],
    txt_mask=text_mask(batch(B)["tokens"], VOCAB - 1),
    txt_enc=normal(2, B, CONTEXT, WIDTH),
)
NOWHERE = jnp.zeros((B, CONTEXT), bool)


def decoder(text, **options):
    return Decoder(UNET_WITH_ATTENTION, DIM, CONTEXT, text, **options)


@pytest.fixture(scope="module", params=["own text encoder", "CLIP's text tower"])
def model(request):
    """(whether the decoder reads tokens, a jitted call, parameters none of which is zero)"""
    network = decoder(TEXT if request.param == "own text encoder" else None)
    params = random_params(lambda key: network.init(key, X_T, T, COND, False))
    apply = jax.jit(lambda params, cond: network.apply(params, X_T, T, cond, False))
    return network.text is not None, apply, params


def far(a, b) -> bool:
    return bool((jnp.abs(a - b).max(axis=(1, 2, 3)) > 1e-3).all())


def test_decoder_starts_as_zero_and_has_a_channel_for_the_variance():
    network = decoder(None)
    out, _ = jax.jit(network.init_with_output, static_argnums=4)(
        jax.random.key(0), X_T, T, COND, False
    )
    assert out.shape == (B, 8, 8, 6) and out.dtype == jnp.float32
    assert not out.any()


def test_masks_hide_the_whole_condition(model):
    reads_tokens, apply, params = model
    name, other = (
        ("tokens", (COND["tokens"] + 1) % 500)
        if reads_tokens
        else ("txt_enc", normal(9, B, CONTEXT, WIDTH))
    )
    out = apply(params, COND)
    assert far(apply(params, {**COND, name: other}), out)
    empty = {**COND, "txt_mask": NOWHERE}
    np.testing.assert_array_equal(apply(params, {**empty, name: other}), apply(params, empty))
    assert far(apply(params, empty), out)

    no_z, other_z = {**COND, "z_mask": jnp.zeros((B,), bool)}, {"z_img": normal(8, B, DIM)}
    assert far(apply(params, COND | other_z), out)
    np.testing.assert_array_equal(apply(params, no_z | other_z), apply(params, no_z))
    assert far(apply(params, no_z), out)


def test_padding_tokens_do_not_matter(model):
    _, apply, params = model
    hidden = ~COND["txt_mask"]
    other = {
        "tokens": jnp.where(hidden, 7, COND["tokens"]),
        "txt_enc": jnp.where(hidden[..., None], 7.0, COND["txt_enc"]),
    }
    np.testing.assert_array_equal(apply(params, COND | other), apply(params, COND))


def test_both_paths_of_z_img_matter(model):
    """It joins the time embedding, and it makes tokens for the attention (section 2.1)."""
    _, apply, params = model
    params = params["params"]
    other = COND | {"z_img": -COND["z_img"]}
    for cut in ("emb_z_img", "tokens_z_img", None):
        without = dict(params)
        if cut:
            without[cut] = jax.tree.map(jnp.zeros_like, params[cut])
        assert far(apply({"params": without}, COND), apply({"params": without}, other)), cut
    for cut in ("emb_z_img", "tokens_z_img"):
        without[cut] = jax.tree.map(jnp.zeros_like, params[cut])
    without = {"params": without}
    np.testing.assert_array_equal(apply(without, COND), apply(without, other))


def test_every_parameter_of_the_decoder_has_a_gradient(model):
    _, apply, params = model
    half = {**COND, "z_mask": jnp.asarray([True, False])}  # else the null is not seen

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.square(apply(p, half) - 1.0).mean())(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path)
        if "['text']['transformer']" in name and "['k']['bias']" in name:
            continue  # the same for all keys: softmax does not see it
        assert jnp.abs(g).max() > 0, name


def test_decoder_in_bfloat16_is_near_and_gives_float32():
    network = decoder(TEXT, dtype=jnp.bfloat16)
    params = random_params(lambda key: network.init(key, X_T, T, COND, False), std=0.05)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(network.apply, static_argnums=4)(params, X_T, T, COND, False)
    exact = jax.jit(decoder(TEXT).apply, static_argnums=4)(params, X_T, T, COND, False)
    assert out.dtype == jnp.float32
    assert jnp.abs(out - exact).max() < 0.1 * jnp.abs(exact).max()


@pytest.fixture(scope="module")
def upsampler():
    network = Upsampler(dict(UNET, patch_size=2, dropout=0.5, remat=True), learned_variance=True)
    low = normal(3, B, 8, 8, 3)
    params = random_params(lambda key: network.init(key, X_T, T, low))
    return network, params, low


def test_a_residual_upsampler_starts_at_the_small_image():
    small = dict(channels=8, channel_mults=(1, 2), num_blocks=1, groups=4)
    x_t, low_res, t = normal(0, 2, 8, 8, 3), normal(1, 2, 8, 8, 3), jnp.array([3, 5])
    for learned_variance in (False, True):
        plain, residual = (
            Upsampler(small, learned_variance=learned_variance, residual=r) for r in (False, True)
        )
        params = residual.init(jax.random.key(0), x_t, t, low_res)
        out = residual.apply(params, x_t, t, low_res)
        np.testing.assert_array_equal(out[..., :3], low_res)  # the U-Net begins as zero
        np.testing.assert_array_equal(out[..., 3:], 0)
        params = jax.tree.map(lambda p: p + 0.1, params)
        added = residual.apply(params, x_t, t, low_res) - plain.apply(params, x_t, t, low_res)
        np.testing.assert_allclose(added[..., :3], low_res, atol=1e-5)
        np.testing.assert_array_equal(added[..., 3:], 0)


def test_upsampler_sees_the_small_image_and_the_time(upsampler):
    network, params, low = upsampler
    run = jax.jit(network.apply)
    out = run(params, X_T, T, low)
    assert out.shape == (B, 8, 8, 6) and out.dtype == jnp.float32
    assert far(run(params, X_T, T, low + 1), out)
    assert far(run(params, X_T, T + 100, low), out)


def test_every_parameter_of_the_upsampler_has_a_gradient(upsampler):
    network, params, low = upsampler

    @jax.jit
    def gradient(params):
        rngs = {"dropout": jax.random.key(1)}
        return jax.grad(
            lambda p: jnp.square(network.apply(p, X_T, T, low, True, rngs=rngs) - 1.0).mean()
        )(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert jnp.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_dropout_acts_in_training_alone(upsampler):
    network, params, low = upsampler
    run = jax.jit(network.apply, static_argnums=4)
    a, b = (
        run(params, X_T, T, low, True, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2)
    )
    assert far(a, b)
    np.testing.assert_array_equal(run(params, X_T, T, low, False), run(params, X_T, T, low, False))


def test_remat_changes_nothing(upsampler):
    network, params, low = upsampler
    plain = Upsampler(dict(network.unet, remat=False), learned_variance=True)
    np.testing.assert_allclose(
        jax.jit(plain.apply)(params, X_T, T, low),
        jax.jit(network.apply)(params, X_T, T, low),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_size_that_does_not_halve_is_refused():
    x = jnp.zeros((1, 9, 8, 3))
    with pytest.raises(ValueError, match=r"multiples of 2, not \(9, 8\)"):
        Upsampler(UNET).init(jax.random.key(0), x, jnp.zeros((1,), jnp.int32), x)
