"""CLIP: what its towers see and ignore, the temperature's bound, the published counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cascade import CONFIGS, CONTEXT, DIM, VOCAB, batch, random_params

from dalle2_jax.imaging import arrays
from dalle2_jax.nets.clip import CLIP, normalise, text_mask

MODEL = CONFIGS["clip"]["model"]
EOT = VOCAB - 1


@pytest.fixture(scope="module")
def clip():
    network = CLIP(**MODEL)
    images, tokens = arrays.to_float(batch()["image"]), batch()["tokens"]
    params = random_params(lambda key: network.init(key, images, tokens)["params"])
    return network, params, images, tokens


def test_text_mask_ends_with_the_first_end_token():
    tokens = jnp.asarray(
        [[5, 7, EOT, 0, 0], [5, EOT, 3, EOT, 0], [1, 2, 3, 4, 5], [EOT, 0, 0, 0, 0]]
    )
    want = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(text_mask(tokens, EOT), np.asarray(want, bool))


def test_embeddings_have_unit_length(clip):
    network, params, images, tokens = clip
    z_img, z_txt, scale = jax.jit(network.apply)({"params": params}, images, tokens)
    for z in (z_img, z_txt):
        assert z.shape == (4, DIM) and z.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1.0, rtol=1e-5)
    assert scale.shape == ()
    assert np.isfinite(normalise(jnp.zeros((1, 3)))).all()


def test_text_after_the_end_token_is_ignored(clip):
    network, params, _, _ = clip
    encode = jax.jit(lambda tokens: network.apply({"params": params}, tokens, method="encode_text"))
    tokens = jnp.asarray([[518, 5, 6, EOT, 0, 0, 0, 0]])
    plain, noisy = encode(tokens), encode(tokens.at[:, 4:].set(9))
    np.testing.assert_allclose(noisy.z_txt, plain.z_txt, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(noisy.txt_enc[:, :4], plain.txt_enc[:, :4], rtol=1e-5, atol=1e-6)
    other = encode(tokens.at[:, 1].set(9))
    assert jnp.abs(other.z_txt - plain.z_txt).max() > 1e-3
    assert plain.txt_enc.shape == (1, CONTEXT, MODEL["text"]["width"])


def test_logit_scale_starts_at_the_papers_and_is_clipped_at_100(clip):
    network, params, images, tokens = clip

    def scale(log_scale):
        values = {"params": {**params, "logit_scale": jnp.float32(log_scale)}}
        return network.apply(values, method="logit_scale")

    fresh = jax.jit(network.init)(jax.random.key(0), images, tokens)["params"]["logit_scale"]
    assert float(scale(fresh)) == pytest.approx(1 / 0.07, rel=1e-5)
    assert float(scale(math.log(50.0))) == pytest.approx(50.0, rel=1e-5)
    assert float(scale(9.0)) == pytest.approx(100.0, rel=1e-5)
    assert float(jax.grad(scale)(9.0)) == pytest.approx(100.0, rel=1e-5)  # so it can come down


def test_wrong_image_size_is_refused(clip):
    network, params, _, tokens = clip
    with pytest.raises(ValueError, match="CLIP sees 16 px"):
        network.apply({"params": params}, jnp.zeros((4, 32, 32, 3)), tokens)


def test_every_parameter_has_a_gradient(clip):
    network, params, images, tokens = clip

    @jax.jit
    def gradient(params):
        def loss(params):
            z_img, z_txt, scale = network.apply({"params": params}, images, tokens)
            return jnp.square(scale * z_img @ z_txt.T - jnp.eye(4)).mean()

        return jax.grad(loss)(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path)
        if "['k']['bias']" in name:  # the same for all keys: softmax does not see it
            continue
        assert jnp.abs(g).max() > 0, name


def test_bfloat16_computes_and_gives_float32(clip):
    _, params, images, tokens = clip
    network = CLIP(**MODEL, dtype=jnp.bfloat16)
    z_img, z_txt, _ = jax.jit(network.apply)({"params": params}, images, tokens)
    assert z_img.dtype == z_txt.dtype == jnp.float32
    exact, _, _ = jax.jit(CLIP(**MODEL).apply)({"params": params}, images, tokens)
    np.testing.assert_allclose(z_img, exact, atol=0.05)


def test_count_of_the_published_l14():
    """427,616,513: open_clip's and OpenAI's ViT-L/14, the logit scale included."""
    network = CLIP(
        dim=768,
        image=dict(image_size=224, patch_size=14, width=1024, depth=24, heads=16),
        text=dict(context_length=77, vocab_size=49408, width=768, depth=12, heads=12),
        activation="quick_gelu",
    )
    shapes = jax.eval_shape(
        lambda: network.init(
            jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
        )
    )
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 427_616_513
