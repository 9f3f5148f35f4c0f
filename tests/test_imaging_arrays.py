"""Arrays of images: ranges, sizes, blur and crops against Pillow, SciPy and by identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dalle2_jax.imaging import arrays


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, (3, 24, 16, 3)), jnp.float32)


def test_uint8_round_trip_is_exact():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    as_float = arrays.to_float(levels)
    assert as_float.dtype == jnp.float32
    assert (as_float.min(), as_float.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(arrays.to_uint8(as_float), levels)


def test_to_uint8_rounds_and_clips():
    x = jnp.array([-7.0, -1.0, 0.4 / 127.5 - 1.0, 0.6 / 127.5 - 1.0, 1.0, 7.0])
    assert arrays.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("size", [(12, 8), (8, 4), (6, 16), (10, 7), (36, 20)])
def test_area_is_the_mean_over_the_covered_area(images, size):
    # Repeat every old pixel until each new one covers a whole number of them.
    height, width = size
    fine = np.repeat(np.repeat(np.asarray(images), height, axis=1), width, axis=2)
    want = fine.reshape(3, height, 24, width, 16, 3).mean(axis=(2, 4), dtype=np.float64)
    np.testing.assert_allclose(arrays.resize(images, size, "area"), want, atol=1e-6)


def test_area_multiplies_in_float32_on_every_machine(images):
    """In a TPU's bfloat16, a mask of ones would not stay one."""
    jaxpr = jax.make_jaxpr(lambda x: arrays.resize(x, (10, 7), "area"))(images)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    exact = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert products and all(e.params["precision"] == exact for e in products)


def test_area_keeps_the_mean(images):
    for size in [(6, 4), (7, 5)]:
        small = arrays.resize(images, size, "area")
        np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("size", [(12, 8), (9, 11), (48, 32), (40, 7)])
def test_bicubic_is_pillows(images, size):
    ours = np.asarray(arrays.resize(images, size, "bicubic"))
    for i in range(3):
        for c in range(3):
            plane = Image.fromarray(np.asarray(images)[i, :, :, c])
            want = plane.resize(size[::-1], Image.Resampling.BICUBIC)
            np.testing.assert_allclose(ours[i, :, :, c], np.asarray(want), atol=2e-5)


@pytest.mark.parametrize("size", [(48, 64), (12, 8), (32, 4)])
def test_nearest_is_pillows(images, size):
    ours = arrays.resize(images, size, "nearest")
    plane = Image.fromarray(np.asarray(images[1, :, :, 2]))
    want = plane.resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(ours[1, :, :, 2], np.asarray(want))


def test_nearest_takes_the_pixel_under_the_centre():
    row = jnp.arange(5.0).reshape(1, 1, 5, 1)
    assert arrays.resize(row, (1, 3), "nearest").ravel().tolist() == [0, 2, 4]
    assert arrays.resize(row, (1, 4), "nearest").ravel().tolist() == [0, 1, 3, 4]
    assert arrays.resize(row, (1, 7), "nearest").ravel().tolist() == [0, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("method", ["area", "bicubic", "nearest"])
def test_a_flat_image_stays_flat(method):
    flat = jnp.full((1, 12, 12, 1), 0.3)
    for side in (5, 6, 12, 30):
        np.testing.assert_allclose(arrays.resize(flat, side, method), 0.3, atol=1e-6)


def test_resize_mistakes():
    with pytest.raises(ValueError, match="'bilinear'"):
        arrays.resize(jnp.zeros((1, 4, 4, 1)), 3, "bilinear")
    with pytest.raises(ValueError, match="1 pixel"):
        arrays.resize(jnp.zeros((1, 4, 4, 1)), 0)


@pytest.mark.parametrize(("kernel_size", "sigma"), [(3, 0.6), (5, 1.3)])
def test_blur_is_scipys(images, kernel_size, sigma):
    ours = arrays.gaussian_blur(images, kernel_size, sigma)
    want = ndimage.gaussian_filter(
        np.asarray(images), (0, sigma, sigma, 0), mode="mirror", radius=kernel_size // 2
    )
    np.testing.assert_allclose(ours, want, atol=1e-6)


def test_blur_with_a_sigma_for_each_image(images):
    sigmas = jnp.array([0.4, 0.6, 2.0])
    together = arrays.gaussian_blur(images, sigma=sigmas)
    for i, sigma in enumerate(sigmas):
        alone = arrays.gaussian_blur(images[i : i + 1], sigma=sigma)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-6)


def test_offsets_cover_every_place_that_fits():
    offsets = arrays.random_offsets(jax.random.key(1), 500, (24, 16), 8)
    assert set(np.unique(offsets[:, 0])) == set(range(17))
    assert set(np.unique(offsets[:, 1])) == set(range(9))
    with pytest.raises(ValueError, match="does not fit"):
        arrays.random_offsets(jax.random.key(1), 1, (24, 16), 17)


def test_crop_cuts_at_its_offsets(images):
    offsets = jnp.array([[0, 0], [3, 5], [16, 8]])
    cut = arrays.crop(images, offsets, 8)
    for i, (y, x) in enumerate(offsets.tolist()):
        np.testing.assert_array_equal(cut[i], images[i, y : y + 8, x : x + 8])


def test_a_pair_shows_the_same_window(images):
    low = arrays.resize(images, (6, 4), "area")
    cut = jax.jit(arrays.random_crop_pair, static_argnums=3)
    small, large = cut(jax.random.key(2), low, images, 8)
    assert (small.shape, large.shape) == ((3, 2, 2, 3), (3, 8, 8, 3))
    np.testing.assert_allclose(arrays.resize(large, 2, "area"), small, atol=1e-6)
    with pytest.raises(ValueError, match="one whole factor"):
        arrays.random_crop_pair(jax.random.key(2), low, images, 7)
