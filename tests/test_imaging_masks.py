"""Known parts of images: random masks, smaller sizes, and pasting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import EPS

from dalle2_jax.imaging import masks


@pytest.fixture(scope="module")
def known_masks() -> np.ndarray:
    return np.asarray(masks.random_known_masks(jax.random.key(0), 512, 32))[..., 0]


def test_masks_are_of_every_kind_and_size(known_masks):
    assert set(np.unique(known_masks)) == {0.0, 1.0}
    share = known_masks.mean(axis=(1, 2))
    assert (share < 0.3).mean() > 0.1 and (share > 0.7).mean() > 0.1
    rows, columns = (known_masks.min(axis=a) == known_masks.max(axis=a) for a in (2, 1))
    halves = rows.all(axis=1) | columns.all(axis=1)  # one side is erased
    assert 0.15 < halves.mean() < 0.35
    middle = known_masks[:, 16, 16] == 0
    border = (known_masks[:, 0].mean(axis=1) + known_masks[:, -1].mean(axis=1)) == 2
    assert (middle & border).any()  # a hole
    assert (
        (share > 0) & (known_masks[:, [0, -1]].max(axis=(1, 2)) == 0)
    ).any()  # everything but an island


def test_masks_depend_on_the_key_only(known_masks):
    again = masks.random_known_masks(jax.random.key(0), 512, 32)[..., 0]
    other = masks.random_known_masks(jax.random.key(1), 512, 32)[..., 0]
    np.testing.assert_array_equal(known_masks, again)
    assert (known_masks != np.asarray(other)).any(axis=(1, 2)).mean() > 0.9


def test_a_mask_covers_the_same_at_any_size():
    """A crop for the upsampler then looks like one of the decoder."""
    share = [float(masks.random_known_masks(jax.random.key(3), 256, n).mean()) for n in (16, 64)]
    assert share[0] == pytest.approx(share[1], abs=0.01)


def test_images_are_shifted_over_white():
    place = jnp.arange(64).reshape(1, 8, 8, 1).repeat(200, 0) / 100  # every pixel has its own value
    shifted = np.asarray(masks.random_shifts(jax.random.key(0), place, 0.5))
    shifts = set()
    for image in shifted[..., 0]:
        inside = np.argwhere(image != 1)
        value = round(100 * float(image[tuple(inside[0])]))
        down, right = inside[0] - np.array(divmod(value, 8))
        expected = np.ones((16 + 8, 16 + 8))
        expected[8 + down : 16 + down, 8 + right : 16 + right] = place[0, ..., 0]
        np.testing.assert_array_equal(image, expected[8:16, 8:16].astype(np.float32))
        shifts.add((int(down), int(right)))
    assert {down for down, _ in shifts} == set(range(-4, 5)) == {right for _, right in shifts}
    np.testing.assert_array_equal(masks.random_shifts(jax.random.key(0), place, 0.0), place)


def test_a_small_pixel_is_known_if_all_that_it_covers_is():
    rgba = np.full((1, 4, 4, 4), 255, np.uint8)
    rgba[0, 0, 0] = [0, 0, 0, 0]
    rgba[0, 3, 3, 3] = 254  # not quite opaque
    rgba[0, :2, 2:, :3] = 0
    small = np.asarray(masks.resize_partly_known(jnp.asarray(rgba), 2))[0]
    np.testing.assert_array_equal(small[..., 3], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(small[0, 0, :3], [0, 0, 0])  # colours are 0 where unknown
    # Within the roundings of a scale, a shift and a mean, which a compiler may fuse.
    np.testing.assert_allclose(small[0, 1, :3], [-1, -1, -1], rtol=4 * EPS)
    np.testing.assert_allclose(small[1, 0, :3], [1, 1, 1], rtol=4 * EPS)


def test_a_border_along_the_edge_of_the_known_part_is_unknown():
    known = jnp.full((1, 12, 12, 4), 255, jnp.uint8).at[:, :, 6:, 3].set(0)
    known_mask = np.asarray(masks.resize_partly_known(known, 6, 1))[0, :, :, 3]
    np.testing.assert_array_equal(known_mask, [[1, 1, 0, 0, 0, 0]] * 6)  # but not along the sides


def test_pasting_keeps_known_pixels_to_the_bit_and_spreads_the_step_beside_them():
    rng = np.random.default_rng(0)
    images, generated = rng.integers(60, 190, (2, 3, 12, 12, 3), np.uint8)
    known_mask = np.ones((12, 12), bool)
    known_mask[:, 6:] = False
    sharp = masks.paste(images, known_mask, generated, 0)
    np.testing.assert_array_equal(sharp[:, :, :6], images[:, :, :6])
    np.testing.assert_array_equal(sharp[:, :, 6:], generated[:, :, 6:])
    soft = masks.paste(images, known_mask, generated, 3)
    np.testing.assert_array_equal(soft[:, :, :6], images[:, :, :6])
    np.testing.assert_array_equal(soft[:, :, 9:], generated[:, :, 9:])
    step = images[:, :, 5:6].astype(float) - generated[:, :, 6:7]
    blended = np.clip(generated[:, :, 6:9] + np.array([0.75, 0.5, 0.25])[:, None] * step, 0, 255)
    assert np.abs(soft[:, :, 6:9] - blended).max() <= 0.5
    np.testing.assert_array_equal(masks.paste(images, known_mask | True, generated, 3), images)
    np.testing.assert_array_equal(masks.paste(images, known_mask & False, generated, 3), generated)


def test_two_even_colours_meet_without_a_line():
    """In a hole, too, whose middle is near to all of its sides."""
    known_mask = np.ones((40, 40), bool)
    known_mask[10:30, 10:30] = False
    images, generated = (np.full((1, 40, 40, 3), grey, np.uint8) for grey in (200, 100))
    pasted = masks.paste(images, known_mask, generated, 7).astype(int)
    assert pasted[0, 20, 20, 0] == 100
    for axis in (1, 2):
        assert np.abs(np.diff(pasted, axis=axis)).max() == 13  # an eighth of the step
