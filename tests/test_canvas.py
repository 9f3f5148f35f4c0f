"""Canvases larger than a frame: what is known of them, and the order of the frames."""

import numpy as np
import pytest

from dalle2_jax import canvas
from dalle2_jax.errors import UserError

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_picture_stands_in_its_canvas_as_asked():
    whole, known, asked = canvas.extended(PICTURE, (3, 4, 5, 6), 8)
    assert whole.shape == (31, 37, 3) and asked == (slice(0, 31), slice(0, 37))
    np.testing.assert_array_equal(whole[5:25, 3:33], PICTURE)
    assert known.sum() == 600 and known[5:25, 3:33].all()


def test_a_canvas_holds_a_frame_at_least():
    whole, known, asked = canvas.extended(PICTURE, (1, 0, 0, 0), 64)
    assert whole.shape == (64, 64, 3)
    assert whole[asked].shape == (20, 31, 3)
    np.testing.assert_array_equal(whole[asked][:, 1:], PICTURE)
    assert not known[asked][:, 0].any() and known.sum() == 600


def test_a_canvas_that_no_memory_holds_is_told():
    with pytest.raises(UserError, match=r"would be 1000030 x 20: at most 64 million pixels"):
        canvas.extended(np.zeros((20, 30, 3), np.uint8), (0, 1_000_000, 0, 0), 64)


@pytest.mark.parametrize("margins", [(64, 64, 64, 64), (0, 100, 0, 0), (10, 0, 0, 7), (0, 0, 0, 1)])
def test_frames_fill_the_canvas_from_the_picture_on(margins):
    size, overlap = 32, 0.5
    _, known, _ = canvas.extended(np.zeros((40, 50, 3), np.uint8), margins, size)
    shares, seen = [], known.copy()
    for window in canvas.frames(known, size, overlap):
        assert seen[window].shape == (size, size)
        shares.append(seen[window].mean())
        assert not seen[window].all()  # each draws something
        seen[window] = True
    assert seen.all()
    assert min(shares) >= overlap
    drawn = (~known).sum() / size**2
    assert len(shares) <= 2 * drawn / (1 - overlap) + 4


def test_frames_draw_what_no_frame_is_half_full_of():
    """A picture of one row."""
    _, known, _ = canvas.extended(np.zeros((1, 40, 3), np.uint8), (0, 0, 30, 30), 32)
    seen = known.copy()
    for window in canvas.frames(known, 32, 0.5):
        assert seen[window].any()  # none begins from nothing
        seen[window] = True
    assert seen.all()


def test_a_mask_is_fitted_so_that_all_that_is_marked_stays_so():
    mask = np.zeros((20, 30), bool)
    mask[7, 12] = True
    picture, small = canvas.fitted(PICTURE, mask, 5)
    assert picture.shape == (5, 5, 3)
    assert small.sum() == 1 and small[7 // 4, (12 - 5) // 4]
    same, large = canvas.fitted(PICTURE[:, :20], mask[:, :20], 20)
    np.testing.assert_array_equal(same, PICTURE[:, :20])
    np.testing.assert_array_equal(large, mask[:, :20])
    assert canvas.fitted(PICTURE, mask, 40)[1].sum() == 4
