"""Image files of every awkward kind -> upright RGB over white."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.imaging import crops, decode
from dalle2_jax.imaging.decode import DamagedImage


def encoded(image, form="PNG", **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def corners():
    """An image of 6 x 4 pixels, white except for a red one at the top left."""
    pixels = np.full((4, 6, 3), 255, np.uint8)
    pixels[0, 0] = 255, 0, 0
    return pixels


def test_rgb_is_exact():
    image = decode.decode(encoded(Image.fromarray(corners())))
    np.testing.assert_array_equal(image, corners())


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top left goes to the top right
    image = decode.decode(encoded(Image.fromarray(corners()), exif=exif))
    np.testing.assert_array_equal(image, np.rot90(corners(), -1))


def test_alpha_goes_over_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0, 3] = 255
    pixels[0, 1, 3] = 51
    image = decode.decode(encoded(Image.fromarray(pixels)))
    np.testing.assert_array_equal(image[..., 0], [[0, 204], [255, 255]])


def test_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 128, 0])
    image.putdata([0, 1])
    decoded = decode.decode(encoded(image, transparency=0))
    np.testing.assert_array_equal(decoded, [[[255, 255, 255], [0, 128, 0]]])


def test_grey_and_grey_with_alpha():
    assert decode.decode(encoded(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2
    assert decode.decode(encoded(Image.new("LA", (1, 1), (0, 0)))).tolist() == [[[255] * 3]]


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.array([[0, 257 * 10, 257 * 100, 65535]], np.uint16)
    decoded = decode.decode(encoded(Image.fromarray(ramp)))
    assert decoded[0, :, 0].tolist() == [0, 10, 100, 255]


def test_cmyk_jpeg():
    decoded = decode.decode(
        encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    )
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize(("form", "options"), [("GIF", {}), ("WEBP", {"lossless": True})])
def test_first_frame_of_an_animation(form, options):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode.decode(data)[0, 0], [255, 0, 0])


def png_header(width, height):
    """A PNG that claims a size and ends where its pixels would begin."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9_000, 8_000)])
def test_large_claims_are_refused_from_the_header(width, height):
    with pytest.raises(DamagedImage, match="above the limit of 64 million pixels"):
        decode.decode(png_header(width, height))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"no image at all", png_header(8, 8)])
def test_bytes_that_are_no_image(data):
    with pytest.raises(DamagedImage) as error:
        decode.decode(data)
    assert "BytesIO" not in str(error.value)


def test_the_error_lists_the_formats_that_are_read():
    kinds = r"\(cut short, or no PNG, JPEG, WEBP, GIF, BMP or TIFF\)"
    with pytest.raises(DamagedImage, match=f"not a readable image {kinds}"):
        decode.decode(b"no image at all")


def test_cut_and_mutated_files_raise_damaged_image_or_decode():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        data_of_file = encoded(noise, form)
        with pytest.raises(DamagedImage):
            decode.decode(data_of_file[: len(data_of_file) // 2])
        for _ in range(50):
            data = bytearray(data_of_file)
            for place in rng.integers(0, len(data), 4):
                data[place] ^= int(rng.integers(1, 256))
            with contextlib.suppress(DamagedImage):
                assert decode.decode(bytes(data), 8).shape == (8, 8, 3)


def test_centre_crop_and_box_resize():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200  # the centre square
    decoded = decode.decode(encoded(Image.fromarray(pixels)), 2)
    np.testing.assert_array_equal(decoded, np.full((2, 2, 3), 200))


def test_crop_at_its_own_size_copies_pixels():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    decoded = crops.crop_resize(pixels, 4, (0.5, 1.0, 0.0))
    np.testing.assert_array_equal(decoded, pixels[4:, :4])


def test_large_jpeg_is_resized_close_to_the_mean():
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], (512, 1, 3))
    decoded = decode.decode(encoded(Image.fromarray(ramp), "JPEG", quality=95), 16)
    expected = ramp.reshape(16, 32, 16, 32, 3).mean((1, 3))
    assert np.abs(decoded - expected).max() < 4
