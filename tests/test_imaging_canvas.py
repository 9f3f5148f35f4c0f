"""Canvases of editing: squares, larger canvases, and the order of the frames that fill them."""

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import canvas

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_canvas_has_its_margins():
    extended, known_mask, window = canvas.extend(IMAGE, (3, 4, 5, 6), 8)
    assert extended.shape == (31, 37, 3) and window == (slice(0, 31), slice(0, 37))
    np.testing.assert_array_equal(extended[5:25, 3:33], IMAGE)
    assert known_mask.sum() == 600 and known_mask[5:25, 3:33].all()


def test_a_canvas_holds_at_least_one_frame():
    extended, known_mask, window = canvas.extend(IMAGE, (1, 0, 0, 0), 64)
    assert extended.shape == (64, 64, 3)
    assert extended[window].shape == (20, 31, 3)
    np.testing.assert_array_equal(extended[window][:, 1:], IMAGE)
    assert not known_mask[window][:, 0].any() and known_mask.sum() == 600


def test_a_canvas_that_is_too_large_is_refused():
    with pytest.raises(UserError, match=r"would be 1000030 x 20: at most 64 million pixels"):
        canvas.extend(np.zeros((20, 30, 3), np.uint8), (0, 1_000_000, 0, 0), 64)


MARGINS = [(64, 64, 64, 64), (0, 100, 0, 0), (10, 0, 0, 7), (0, 0, 0, 1), (0, 90, 0, 90)]


@pytest.mark.parametrize("margins", MARGINS)
def test_frames_fill_the_canvas_starting_from_the_image(margins):
    size, overlap = 32, 0.5
    _, known_mask, _ = canvas.extend(np.zeros((40, 50, 3), np.uint8), margins, size)
    shares, filled = [], known_mask.copy()
    for window in canvas.frames(known_mask, size, overlap):
        assert filled[window].shape == (size, size)
        shares.append(filled[window].mean())
        assert not filled[window].all()  # each generates something
        filled[window] = True
    assert filled.all()
    assert min(shares) >= overlap
    frames_needed = (~known_mask).sum() / size**2
    assert len(shares) <= 2 * frames_needed / (1 - overlap) + 4


@pytest.mark.parametrize("margins", [(64, 64, 64, 64), (0, 400, 0, 0), (0, 300, 0, 300)])
def test_the_number_of_frames_is_estimated(margins):
    shape, size = (64, 64, 3), 32
    _, known_mask, _ = canvas.extend(np.zeros(shape, np.uint8), margins, size)
    count = len(list(canvas.frames(known_mask, size, 0.5)))
    assert canvas.estimate_frames(shape, margins, size) == pytest.approx(count, rel=0.5)


@pytest.mark.parametrize("shape", [(40, 50), (32, 32), (10, 12), (128, 70)])
@pytest.mark.parametrize("margins", MARGINS)
def test_no_pixel_is_generated_beside_a_known_one_outside_the_frame(margins, shape):
    """A hard seam would remain there: the network does not see its other side, and no feather
    smooths it."""
    size = 32
    _, known_mask, _ = canvas.extend(np.zeros((*shape, 3), np.uint8), margins, size)
    for rows, columns in canvas.frames(known_mask, size, 0.5):
        generated = np.zeros_like(known_mask)
        generated[rows, columns] = ~known_mask[rows, columns]
        outside = known_mask.copy()
        outside[rows, columns] = False
        for axis in (0, 1):
            later, earlier = (np.delete(generated, end, axis) for end in (0, -1))
            outside_later, outside_earlier = (np.delete(outside, end, axis) for end in (0, -1))
            assert not (later & outside_earlier).any() and not (earlier & outside_later).any()
        known_mask[rows, columns] = True


def test_frames_continue_an_image_that_fills_no_half_of_a_frame():
    """An image of one row."""
    _, known_mask, _ = canvas.extend(np.zeros((1, 40, 3), np.uint8), (0, 0, 30, 30), 32)
    filled = known_mask.copy()
    for window in canvas.frames(known_mask, 32, 0.5):
        assert filled[window].any()  # each sees something that is known
        filled[window] = True
    assert filled.all()


def test_marked_pixels_stay_marked_in_a_smaller_mask():
    mask = np.zeros((20, 30), bool)
    mask[7, 12] = True
    image, small = canvas.fit_square(IMAGE, mask, 5)
    assert image.shape == (5, 5, 3)
    assert small.sum() == 1 and small[7 // 4, (12 - 5) // 4]
    same, large = canvas.fit_square(IMAGE[:, :20], mask[:, :20], 20)
    np.testing.assert_array_equal(same, IMAGE[:, :20])
    np.testing.assert_array_equal(large, mask[:, :20])
    assert canvas.fit_square(IMAGE, mask, 40)[1].sum() == 4
    large = np.zeros((4096, 4096), bool)
    large[9, 9] = True
    assert canvas.fit_square(np.zeros((4096, 4096, 3), np.uint8), large, 128)[1].sum() == 1


@pytest.mark.parametrize("shape", [(20, 23), (23, 20), (20, 21), (20, 26)])
def test_image_and_mask_are_cut_alike(shape):
    mask = np.zeros(shape, bool)
    mask[8:12, 9:13] = True
    image = np.where(mask[..., None], np.uint8([255, 0, 0]), np.uint8(0))
    small, marked = canvas.fit_square(image, mask, 20)
    np.testing.assert_array_equal(marked, small[..., 0] == 255)


def test_a_mask_outside_of_the_centre_square_is_refused():
    mask = np.zeros((20, 60), bool)
    mask[:, :19] = True
    with pytest.raises(
        UserError, match="marks nothing of the middle 20 x 20 pixels, which alone are generated"
    ):
        canvas.fit_square(np.zeros((20, 60, 3), np.uint8), mask, 20)
