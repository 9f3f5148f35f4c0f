"""Editing with DALLE2: inversion, variations, interpolations and text diffs."""

import dataclasses

import numpy as np
import pytest
from tolerance import ROUNDED

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2, Latents

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 24, 16, 3), np.uint8)
STEPS = 10
Z = np.ones((1, 16))


@pytest.fixture(scope="module")
def model(folder) -> DALLE2:
    return DALLE2.from_pretrained(folder)


@pytest.fixture(scope="module")
def small(model) -> DALLE2:
    """A model without upsamplers: its images are those of the decoder that is inverted."""
    return model.at_size(8)


def apart(a, b) -> int:
    """Returns the largest difference between two images, in levels of 255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_with_more_steps_an_image_is_kept_better():
    """On the packaged weights: random ones give images that clipping to [-1, 1] cuts everywhere."""
    tiny = DALLE2.from_pretrained(size=32)
    images = tiny.generate(["a flat emoji of a red apple", "a glossy 3d emoji of a whale"], seed=1)

    def psnr(steps: int) -> float:
        error = tiny.reconstruct(images, steps=steps).astype(float) - images
        return 20 * np.log10(255 / np.sqrt((error**2).mean()))

    # Each is 3 dB above the last, the last at 33 dB: the bounds leave a factor of 1.6 and more in
    # the mean square error. Another image comes to 6 dB.
    few, more, most = psnr(5), psnr(20), psnr(80)
    assert few + 1 < more < most - 1 and most > 29


def test_an_image_inverts_to_the_same_alone_and_in_any_batch(small):
    together = small.invert(IMAGES, steps=STEPS)
    for i, image in enumerate(IMAGES):
        alone = small.invert(image[None], steps=STEPS, batch_size=1)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-3, atol=1e-3)


def test_the_middle_of_an_image_is_inverted(small):
    np.testing.assert_array_equal(
        small.invert(IMAGES, steps=2).x_T, small.invert(IMAGES[:, 4:20], steps=2).x_T
    )


def test_variations_without_noise_are_the_reconstruction(model):
    again = model.reconstruct(IMAGES, steps=STEPS)
    assert again.shape == (3, 16, 16, 3)
    same = model.variations(IMAGES, 2, steps=STEPS, eta=0.0, cfg_scale=1.0)
    # The upsampler's noise depends on the seed and on the number among an image's n. Its image is
    # rounded, and the decoder's that it enlarges.
    assert apart(same[::2][0], again[0]) <= 2 * ROUNDED
    others = model.variations(IMAGES, 2, steps=STEPS, eta=1.0)
    assert others.shape == (6, 16, 16, 3)
    assert all(apart(others[i], others[j]) > 8 for i in range(6) for j in range(i))
    np.testing.assert_array_equal(others, model.variations(IMAGES, 2, steps=STEPS, eta=1.0))


def test_the_ends_of_an_interpolation_are_the_reconstructions(small):
    a, b = IMAGES[:2]
    frames = small.interpolate(a, b, 5, steps=STEPS)
    ends = small.reconstruct(IMAGES[:2], steps=STEPS)
    assert frames.shape == (5, 8, 8, 3)
    assert apart(frames[[0, -1]], ends) <= ROUNDED
    fixed = small.interpolate(a, b, 5, steps=STEPS, x_T="fixed")
    assert apart(fixed[0], ends[0]) > 8
    other = small.interpolate(a, b, 5, 1, steps=STEPS, x_T="fixed")
    assert apart(fixed, other) > 8


def test_an_interpolation_to_a_text_keeps_x_T_and_ends_in_its_z_img(small):
    frames = small.interpolate(IMAGES[0], "a cat", 3, seed=4, steps=STEPS)
    x_T = small.invert(IMAGES[:1], steps=STEPS).x_T
    z_img = small.sample_prior("a cat", seed=4)
    assert apart(frames[0], small.reconstruct(IMAGES[:1], steps=STEPS)[0]) <= ROUNDED
    assert apart(frames[-1], small.decode(Latents(z_img, x_T), steps=STEPS)[0]) <= ROUNDED


def test_sample_prior_samples_the_z_img_that_generate_decodes(model):
    z_img = model.sample_prior(["a cat", "dog, flat"], n=2, seed=3)
    assert z_img.shape == (4, model.cascade.clip.dim)
    images = model.generate(["a cat", "dog, flat"], n=2, seed=3)
    again = model.generate(["a cat", "dog, flat"], n=2, seed=3, z_img=z_img)
    assert apart(images, again) <= ROUNDED


def test_a_text_diff_starts_at_the_reconstruction_and_turns_towards_the_difference(small):
    frames = small.text_diff(IMAGES[0], "a cat", "dog, flat", 4, theta=0.9, steps=STEPS)
    assert apart(frames[0], small.reconstruct(IMAGES[:1], steps=STEPS)[0]) <= ROUNDED
    assert all(apart(frames[i], frames[0]) > 2 for i in range(1, 4))
    # At theta 1 z_img is the difference itself, whatever the image shows.
    last = small.text_diff(IMAGES[0], "a cat", "dog, flat", 2, theta=1, steps=STEPS)[-1]
    z_new, z_old = small.encode_text(["a cat", "dog, flat"])
    x_T = small.invert(IMAGES[:1], steps=STEPS).x_T
    z_d = (z_new - z_old)[None] / np.linalg.norm(z_new - z_old)
    assert apart(last, small.decode(Latents(z_d, x_T), steps=STEPS)[0]) <= ROUNDED


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.reconstruct(IMAGES[0]), r"images must be uint8 \[b, h, w, 3\], not uint8"),
        (lambda m: m.reconstruct(IMAGES, steps=0), "steps must be whole numbers from 1"),
        (lambda m: m.reconstruct(IMAGES, steps=9999), "steps must be at most 20"),
        (lambda m: m.invert(IMAGES, iterations=0), "iterations must be a whole number from 1"),
        (lambda m: m.invert(IMAGES, batch_size=0), "batch_size must be a whole number from 1"),
        (lambda m: m.variations(IMAGES, eta=1.5), "eta must be within 0 and 1, not 1.5"),
        (lambda m: m.variations(IMAGES, 0), "n must be a whole number from 1"),
        (lambda m: m.interpolate(IMAGES, "a cat"), r"a must be uint8 \[h, w, 3\], not uint8"),
        (lambda m: m.interpolate(IMAGES[0], None), r"b must be uint8 \[h, w, 3\], not object"),
        (lambda m: m.interpolate(IMAGES[0], "a", 1), "frames must be a whole number from 2"),
        (
            lambda m: m.interpolate(*IMAGES[:2], x_T="no"),
            "x_T must be one of 'slerp', 'fixed', not 'no'",
        ),
        (lambda m: m.text_diff(IMAGES[0], ""), "a caption is empty"),
        (lambda m: m.text_diff(IMAGES[0], "a", "b", theta=2), "theta must be a number from 0 to 1"),
        (lambda m: m.text_diff(IMAGES[0], "a", "a"), "have the same embedding: write what differs"),
        (
            lambda m: m.text_diff(IMAGES[0], "a", frames=10**12),
            "frames must be a whole number",
        ),
        (lambda m: m.variations(IMAGES, 10**12), "n must be a whole number from 1 to 10000, not"),
        (lambda m: m.interpolate([[1, 2], [3]], "a"), "a must be an array, all of its rows of one"),
        (lambda m: m.decode((1, 2)), r"latents must be Latents\(z_img, x_T\), not tuple"),
        (lambda m: m.decode(Latents(Z, [[1, 2], [3]])), "x_T must be an array, all of its rows"),
        (lambda m: m.decode(Latents(Z, Z * np.nan)), "x_T must be an array of finite numbers"),
        (lambda m: m.decode(Latents(Z, Z * 1j)), "x_T must be an array of finite numbers"),
        (lambda m: m.decode(Latents(Z, Z * 1e300)), "x_T must be an array of finite numbers"),
        (lambda m: m.encode_text(Z), "captions must be a list of texts"),
        (lambda m: m.encode_text(3), "captions must be a list of texts, not 3"),
    ],
)
def test_wrong_arguments_are_one_line(model, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_steps_that_inpainting_repeats_are_not_repeated_in_inversion(small):
    settings = dataclasses.replace(small.cascade.decoder.settings, repeats=3)
    decoder = dataclasses.replace(small.cascade.decoder, settings=settings)
    again = DALLE2(dataclasses.replace(small.cascade, decoder=decoder))
    plain, repeated = (m.reconstruct(IMAGES, steps=STEPS) for m in (small, again))
    assert apart(plain, repeated) == 0


def test_numpy_scalars_are_accepted(small):
    frames = small.text_diff(IMAGES[0], "a cat", "dog", 2, theta=np.float32(0.5), steps=2)
    assert apart(frames, small.text_diff(IMAGES[0], "a cat", "dog", 2, steps=2)) == 0


def test_an_image_of_one_pixel_is_enlarged(model):
    assert model.reconstruct(np.full((1, 1, 1, 3), 200, np.uint8), steps=2).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("wrong", [{"eta": 2.0}, {"n": 0}, {"seed": -1}, {"seed": [1]}])
def test_a_mistake_is_reported_before_the_inversion(model, wrong):
    def progress(*_):
        raise AssertionError("the inversion has begun")

    with pytest.raises(UserError):
        model.variations(IMAGES, **wrong, progress=progress)
