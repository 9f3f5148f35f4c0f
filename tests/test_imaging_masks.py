"""What is known of a picture: random masks, smaller sizes, and pasting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.imaging import masks


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return np.asarray(masks.random_masks(jax.random.key(0), 512, 32))[..., 0]


def test_masks_are_of_every_kind_and_size(many):
    assert set(np.unique(many)) == {0.0, 1.0}
    known = many.mean(axis=(1, 2))
    assert (known < 0.3).mean() > 0.1 and (known > 0.7).mean() > 0.1
    rows, columns = (many.min(axis=a) == many.max(axis=a) for a in (2, 1))
    halves = rows.all(axis=1) | columns.all(axis=1)  # a whole side is erased
    assert 0.15 < halves.mean() < 0.35
    middle = many[:, 16, 16] == 0
    border = (many[:, 0].mean(axis=1) + many[:, -1].mean(axis=1)) == 2
    assert (middle & border).any()  # a hole
    assert ((known > 0) & (many[:, [0, -1]].max(axis=(1, 2)) == 0)).any()  # all but an island


def test_a_mask_is_its_keys(many):
    again = masks.random_masks(jax.random.key(0), 512, 32)[..., 0]
    other = masks.random_masks(jax.random.key(1), 512, 32)[..., 0]
    np.testing.assert_array_equal(many, again)
    assert (many != np.asarray(other)).any(axis=(1, 2)).mean() > 0.9


def test_a_mask_covers_the_same_at_any_size():
    """So that a crop for the upsampler looks as those of the decoder."""
    share = [float(masks.random_masks(jax.random.key(3), 256, n).mean()) for n in (16, 64)]
    assert share[0] == pytest.approx(share[1], abs=0.01)


def test_pictures_are_moved_over_white():
    place = jnp.arange(64).reshape(1, 8, 8, 1).repeat(200, 0) / 100  # each pixel is another one
    made = np.asarray(masks.moved(jax.random.key(0), place, 0.5))
    ways = set()
    for one in made[..., 0]:
        kept = np.argwhere(one != 1)
        value = round(100 * float(one[tuple(kept[0])]))
        down, right = kept[0] - np.array(divmod(value, 8))
        wanted = np.ones((16 + 8, 16 + 8))
        wanted[8 + down : 16 + down, 8 + right : 16 + right] = place[0, ..., 0]
        np.testing.assert_array_equal(one, wanted[8:16, 8:16].astype(np.float32))
        ways.add((int(down), int(right)))
    assert {way[0] for way in ways} == set(range(-4, 5)) == {way[1] for way in ways}
    np.testing.assert_array_equal(masks.moved(jax.random.key(0), place, 0.0), place)


def test_a_small_pixel_is_known_where_all_it_covers_is():
    rgba = np.full((1, 4, 4, 4), 255, np.uint8)
    rgba[0, 0, 0] = [0, 0, 0, 0]
    rgba[0, 3, 3, 3] = 254  # not quite
    rgba[0, :2, 2:, :3] = 0
    small = np.asarray(masks.known_at(jnp.asarray(rgba), 2))[0]
    np.testing.assert_array_equal(small[..., 3], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(small[0, 0, :3], [0, 0, 0])  # what is not known is not told
    np.testing.assert_allclose(small[0, 1, :3], [-1, -1, -1], atol=1e-6)
    np.testing.assert_allclose(small[1, 0, :3], [1, 1, 1], atol=1e-6)  # 255 / 127.5 rounds


def test_a_ring_along_the_edge_of_what_is_known_is_told_as_unknown():
    known = jnp.full((1, 12, 12, 4), 255, jnp.uint8).at[:, :, 6:, 3].set(0)
    told = np.asarray(masks.known_at(known, 6, 1))[0, :, :, 3]
    np.testing.assert_array_equal(told, [[1, 1, 0, 0, 0, 0]] * 6)  # the picture's sides are no edge


def test_pasting_keeps_the_known_to_the_bit_and_spreads_the_step_beside_it():
    rng = np.random.default_rng(0)
    given, drawn = rng.integers(60, 190, (2, 3, 12, 12, 3), np.uint8)
    known = np.ones((12, 12), bool)
    known[:, 6:] = False
    sharp = masks.paste(given, known, drawn, 0)
    np.testing.assert_array_equal(sharp[:, :, :6], given[:, :, :6])
    np.testing.assert_array_equal(sharp[:, :, 6:], drawn[:, :, 6:])
    soft = masks.paste(given, known, drawn, 3)
    np.testing.assert_array_equal(soft[:, :, :6], given[:, :, :6])
    np.testing.assert_array_equal(soft[:, :, 9:], drawn[:, :, 9:])
    step = given[:, :, 5:6].astype(float) - drawn[:, :, 6:7]
    moved = np.clip(drawn[:, :, 6:9] + np.array([0.75, 0.5, 0.25])[:, None] * step, 0, 255)
    assert np.abs(soft[:, :, 6:9] - moved).max() <= 0.5
    np.testing.assert_array_equal(masks.paste(given, known | True, drawn, 3), given)
    np.testing.assert_array_equal(masks.paste(given, known & False, drawn, 3), drawn)


def test_two_even_colours_meet_without_a_line():
    """In a hole, too, which every side of comes nearer to."""
    known = np.ones((40, 40), bool)
    known[10:30, 10:30] = False
    given, drawn = (np.full((1, 40, 40, 3), grey, np.uint8) for grey in (200, 100))
    made = masks.paste(given, known, drawn, 7).astype(int)
    assert made[0, 20, 20, 0] == 100
    for axis in (1, 2):
        assert np.abs(np.diff(made, axis=axis)).max() == 13  # an eighth of the step
