"""Layers against definitions written out in numpy, and against XLA's own convolution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.nets.attention import attention, merge_heads, split_heads
from dalle2_jax.nets.layers import (
    DIMENSIONS,
    Conv3x3,
    GroupNorm,
    LayerNorm,
    conv3x3,
    timestep_embedding,
)
from dalle2_jax.nets.transformer import Transformer, causal_mask, exact_gelu, quick_gelu
from dalle2_jax.nets.unet import double, fold, halve, unfold


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def xla_conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 4, 6), (1, 5, 7, 3, 2), (3, 1, 4, 2, 5), (2, 2, 2, 1, 1)]
)
def test_conv3x3_and_its_own_backward_equal_xla(shape):
    b, h, w, c, d = shape
    x, kernel, g = normal(0, b, h, w, c), normal(1, 3, 3, c, d), normal(2, b, h, w, d)
    out, backward = jax.vjp(conv3x3, x, kernel)
    out_ref, backward_ref = jax.vjp(xla_conv, x, kernel)
    np.testing.assert_allclose(out, out_ref, atol=1e-5)
    for got, want in zip(backward(g), backward_ref(g), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("h", "w", "patches"), [(2, 3, True), (16, 17, False)])
def test_drawing_few_pixels_of_many_channels_equals_xla(h, w, patches):
    x, kernel = normal(0, 1, h, w, 1024), normal(1, 3, 3, 1024, 512) / 96
    program = jax.jit(conv3x3).lower(x, kernel).as_text()
    assert ("stablehlo.dot_general" in program) is patches
    assert ("stablehlo.convolution" in program) is not patches
    np.testing.assert_allclose(conv3x3(x, kernel), xla_conv(x, kernel), atol=2e-5)


def test_conv3x3_keeps_bfloat16():
    x, kernel = normal(0, 1, 4, 4, 2).astype(jnp.bfloat16), normal(1, 3, 3, 2, 3)
    kernel = kernel.astype(jnp.bfloat16)
    dx, dkernel = jax.grad(lambda x, k: conv3x3(x, k).astype(jnp.float32).sum(), (0, 1))(x, kernel)
    assert conv3x3(x, kernel).dtype == dx.dtype == dkernel.dtype == jnp.bfloat16


def test_zero_convolution_starts_at_zero_and_learns():
    layer, x = Conv3x3(4, zero=True), normal(0, 1, 4, 4, 2)
    params = layer.init(jax.random.key(0), x)
    assert not layer.apply(params, x).any()
    grads = jax.grad(lambda p: (layer.apply(p, x) - 1.0).sum())(params)["params"]
    assert grads["kernel"].any() and grads["bias"].any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_a_softmax_over_the_keys_it_may_see(masked):
    q, k, v = normal(0, 2, 3, 2, 4), normal(1, 2, 5, 2, 4), normal(2, 2, 5, 2, 4)
    mask = np.random.default_rng(3).random((2, 1, 3, 5)) < 0.5
    mask[..., 0] = True
    want = np.zeros(q.shape)
    for b, i, head in np.ndindex(2, 3, 2):
        see = [j for j in range(5) if not masked or mask[b, 0, i, j]]
        weights = [math.exp(np.dot(q[b, i, head], k[b, j, head]) / 2.0) for j in see]
        rows = [w * np.asarray(v[b, j, head]) for w, j in zip(weights, see, strict=True)]
        want[b, i, head] = sum(rows) / sum(weights)
    got = attention(q, k, v, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_attention_of_a_query_that_sees_nothing_is_finite():
    q = normal(0, 1, 2, 1, 4)
    mask = jnp.asarray([[[[False, False], [True, False]]]])
    out = attention(q, q, q, mask)
    np.testing.assert_allclose(out[0, 0], q[0].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[0, 1], q[0, 0], rtol=1e-6)


def test_attention_tells_near_logits_apart_in_bfloat16():
    """Logits of 100.25 and 100 are one number in bfloat16; their weights are not."""
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16).at[..., :2].set(jnp.asarray([20, 1], jnp.bfloat16))
    k = jnp.asarray([[10, 0.5, 0, 0], [10, 0, 0, 0]], jnp.bfloat16)[None, :, None]
    v = jnp.asarray([1, 0], jnp.bfloat16)[None, :, None, None]
    weight = float(attention(q, k, v)[0, 0, 0, 0])
    assert weight == pytest.approx(1 / (1 + np.exp(-0.25)), abs=4e-3)


def test_heads_round_trip():
    x = normal(0, 2, 3, 12)
    assert split_heads(x, 4).shape == (2, 3, 4, 3)
    np.testing.assert_array_equal(merge_heads(split_heads(x, 4)), x)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unfold_is_the_inverse_of_fold(p):
    x = normal(0, 2, 6, 12, 3)
    folded = fold(x, p)
    assert folded.shape == (2, 6 // p, 12 // p, 3 * p * p)
    np.testing.assert_array_equal(unfold(folded, p), x)
    # a patch's own pixels, and no others, are its channels
    np.testing.assert_array_equal(folded[0, 0, 0], x[0, :p, :p].reshape(-1))


def test_halve_averages_and_undoes_double():
    x = normal(0, 1, 4, 6, 2)
    np.testing.assert_allclose(halve(x)[0, 1, 2], x[0, 2:4, 4:6].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(halve(double(x)), x, rtol=1e-6)


def test_timestep_embedding_is_cosines_then_sines():
    emb = timestep_embedding(jnp.asarray([0, 7]), 9)
    freqs = 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(emb[0], [1, 1, 1, 1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(emb[1, :4], np.cos(7 * freqs), atol=1e-5)
    np.testing.assert_allclose(emb[1, 4:8], np.sin(7 * freqs), atol=1e-5)


def test_norms_normalise_in_float32():
    x = (100 + normal(0, 2, 4, 4, 8)).astype(jnp.bfloat16)
    for layer, axes in ((LayerNorm(), (-1,)), (GroupNorm(groups=1), (1, 2, 3))):
        out, params = layer.init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.bfloat16
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        out = np.asarray(out, np.float32)
        np.testing.assert_allclose(out.mean(axis=axes), 0, atol=0.02)
        np.testing.assert_allclose(out.std(axis=axes), 1, atol=0.02)


def test_activations_at_known_values():
    x = jnp.asarray([-1.0, 0.0, 1.0])
    phi = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    np.testing.assert_allclose(exact_gelu(x), [phi - 1, 0, phi], atol=1e-6)
    sigmoid = 1 / (1 + math.exp(-1.702))
    np.testing.assert_allclose(quick_gelu(x), [sigmoid - 1, 0, sigmoid], atol=1e-6)


def test_causal_transformer_does_not_see_the_future():
    model, x = Transformer(depth=2, heads=2), normal(0, 1, 6, 8)
    params = jax.jit(model.init)(jax.random.key(0), x)
    run = jax.jit(model.apply)
    before, changed = run(params, x, causal_mask(6)), x.at[:, 4].multiply(-1.0)
    after = run(params, changed, causal_mask(6))
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-6, atol=1e-6)
    assert (jnp.abs(after[:, 4:] - before[:, 4:]).max(axis=-1) > 1e-3).all()
    # without the mask the first position does see it
    assert jnp.abs(run(params, changed)[:, 0] - run(params, x)[:, 0]).max() > 1e-3


def test_transformer_layers_are_stacked_and_start_apart():
    x = normal(0, 1, 2, 8)
    params = jax.jit(Transformer(depth=3, heads=2).init)(jax.random.key(0), x)["params"]
    kernel = params["blocks"]["q"]["kernel"]
    assert kernel.shape == (3, 8, 8)
    assert not np.allclose(kernel[0], kernel[1])
