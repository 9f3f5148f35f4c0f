"""Canvases larger than a frame: what is known of them, and the order of the frames."""

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import canvas

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


MARGINS = [(64, 64, 64, 64), (0, 100, 0, 0), (10, 0, 0, 7), (0, 0, 0, 1), (0, 90, 0, 90)]


@pytest.mark.parametrize("margins", MARGINS)
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


@pytest.mark.parametrize("margins", [(64, 64, 64, 64), (0, 400, 0, 0), (0, 300, 0, 300)])
def test_about_how_many_frames_it_takes(margins):
    shape, size = (64, 64, 3), 32
    _, known, _ = canvas.extended(np.zeros(shape, np.uint8), margins, size)
    count = len(list(canvas.frames(known, size, 0.5)))
    assert canvas.estimate(shape, margins, size) == pytest.approx(count, rel=0.5)


@pytest.mark.parametrize("shape", [(40, 50), (32, 32), (10, 12), (128, 70)])
@pytest.mark.parametrize("margins", MARGINS)
def test_nothing_is_drawn_right_beside_what_is_known_but_not_seen(margins, shape):
    """There a hard seam would stand: the network does not see the one side of it, and no feather
    lies over it."""
    size = 32
    _, known, _ = canvas.extended(np.zeros((*shape, 3), np.uint8), margins, size)
    for rows, columns in canvas.frames(known, size, 0.5):
        drawn = np.zeros_like(known)
        drawn[rows, columns] = ~known[rows, columns]
        outside = known.copy()
        outside[rows, columns] = False
        for axis in (0, 1):
            far, near = (np.delete(drawn, end, axis) for end in (0, -1))
            there, here = (np.delete(outside, end, axis) for end in (0, -1))
            assert not (far & here).any() and not (near & there).any()
        known[rows, columns] = True


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
    large = np.zeros((4096, 4096), bool)
    large[9, 9] = True
    assert canvas.fitted(np.zeros((4096, 4096, 3), np.uint8), large, 128)[1].sum() == 1


@pytest.mark.parametrize("shape", [(20, 23), (23, 20), (20, 21), (20, 26)])
def test_picture_and_mask_are_cut_alike(shape):
    mask = np.zeros(shape, bool)
    mask[8:12, 9:13] = True
    picture = np.where(mask[..., None], np.uint8([255, 0, 0]), np.uint8(0))
    small, marked = canvas.fitted(picture, mask, 20)
    np.testing.assert_array_equal(marked, small[..., 0] == 255)


def test_a_mask_outside_of_what_is_drawn_is_told():
    mask = np.zeros((20, 60), bool)
    mask[:, :19] = True
    with pytest.raises(UserError, match="marks nothing of the middle 20 x 20 pixels, which alone"):
        canvas.fitted(np.zeros((20, 60, 3), np.uint8), mask, 20)
