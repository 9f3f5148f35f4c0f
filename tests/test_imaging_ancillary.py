"""Tags, profiles, comments and chunks of an image file: absent, odd, damaged or large."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import icc
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dalle2_jax.imaging import files
from dalle2_jax.imaging.ancillary import without_ancillary
from dalle2_jax.imaging.decode import DamagedImage, decode, transparent

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), np.uint8)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}}


def encoded(image, form="PNG", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        data, form, **options
    )
    return data.getvalue()


def turned() -> list[np.ndarray]:
    """PIXELS as each of EXIF's eight orientations shows them."""
    return [np.rot90(x, k) for x in (PIXELS, PIXELS[:, ::-1]) for k in range(4)]


def oriented(value: int) -> bytes:
    """EXIF with an orientation, a maker's note and a date."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0132], exif[0x927C] = value, "2026:01:01 00:00:00", b"note" * 8
    return exif.tobytes()


# --- Tags


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!", b"", b"Exif\0\0", b"\0", b"II*\0" + b"\xff" * 40]
)
def test_tags_that_cannot_be_read_cost_no_pixel(form, exif, tmp_path):
    data = encoded(PIXELS, form, exif=exif, **LOSSLESS[form])
    np.testing.assert_array_equal(decode(data), PIXELS)
    path = tmp_path / "image"
    path.write_bytes(data)
    np.testing.assert_array_equal(files.read(path), PIXELS)
    assert not transparent(data).any()


@pytest.mark.parametrize("kind", range(14))
def test_one_odd_tag_leaves_the_orientation(kind):
    """A date of any type, known or not, of any count."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    entries += struct.pack("<HHI4s", 0x0132, kind, 3, b"ab\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    np.testing.assert_array_equal(decode(encoded(PIXELS, exif=exif)), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [(2, 2, b"6\0"), (3, 2, b"\1\0\2\0"), (3, 1, b"\0"), (3, 1, b"\x09"), (4, 1, b"\xff" * 4)],
)
def test_an_orientation_that_is_none_is_left(kind, count, value):
    entry = struct.pack("<HHI4s", 0x0112, kind, count, value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    np.testing.assert_array_equal(decode(encoded(PIXELS, exif=exif)), PIXELS)


@pytest.mark.parametrize("form", LOSSLESS)
def test_random_damage_to_tags_costs_no_pixel(form):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        exif = bytearray(oriented(int(rng.integers(1, 9))))
        for place in rng.integers(6, len(exif), 1 + seed % 4):
            exif[place] = rng.integers(256)
        exif = bytes(exif[: rng.integers(8, len(exif) + 1)]) if seed % 3 == 0 else bytes(exif)
        image = decode(encoded(PIXELS, form, exif=exif, **LOSSLESS[form]))
        assert any(np.array_equal(image, x) for x in turned()), seed


def test_random_damage_to_the_tags_of_a_jpeg_costs_no_pixel():
    plain = decode(encoded(PIXELS, "JPEG", quality=95))
    shown = [np.rot90(x, k) for x in (plain, plain[:, ::-1]) for k in range(4)]
    for seed in range(150):
        rng = np.random.default_rng(seed)
        exif = bytearray(oriented(int(rng.integers(1, 9))))
        for place in rng.integers(0, len(exif), 1 + seed % 4):
            exif[place] = rng.integers(256)
        image = decode(encoded(PIXELS, "JPEG", quality=95, exif=bytes(exif)))
        assert any(np.array_equal(image, x) for x in shown), seed


def test_pillow_says_nothing_of_odd_tags(tmp_path):
    data = encoded(PIXELS, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    (tmp_path / "a.jpg").write_bytes(data)
    script = f"from dalle2_jax.imaging import files; files.read({str(tmp_path / 'a.jpg')!r})"
    command = [sys.executable, "-W", "default", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.warns(UserWarning, match="EXIF"):  # it would have
        Image.open(io.BytesIO(data)).getexif()


# --- Profiles


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ((234, 51, 35), (255, 0, 0)),
        ((0, 0, 245), (0, 0, 255)),
        ((255, 255, 255), (255, 255, 255)),
        ((0, 0, 0), (0, 0, 0)),
        ((128, 128, 128), (128, 128, 128)),
    ],
)
@pytest.mark.parametrize("form", LOSSLESS)
def test_a_wide_gamut_becomes_srgb(form, stored, shown):
    """The stored values are sRGB's, as every colour-managed program converts them to Display P3."""
    image = Image.new("RGB", (5, 4), stored)
    data = encoded(image, form, icc_profile=icc.display_p3(), **LOSSLESS[form])
    np.testing.assert_allclose(decode(data).astype(int), np.full((4, 5, 3), shown), atol=1)


def test_the_mode_of_the_file_does_not_matter():
    """Palette, alpha, transparent colour, orientation and JPEG keep the profile."""
    profile, red = icc.display_p3(), (234, 51, 35)
    image = Image.new("RGB", (16, 16), red)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encoded(image.quantize(4), icc_profile=profile),
        encoded(image.convert("RGBA"), icc_profile=profile),
        encoded(image, icc_profile=profile, transparency=(1, 2, 3)),
        encoded(image, icc_profile=profile, exif=exif),
        encoded(image, "TIFF", icc_profile=profile),
        encoded(image, "JPEG", icc_profile=profile, quality=100, subsampling=0),
    ):
        pixels = decode(data).reshape(-1, 3).astype(int)
        np.testing.assert_allclose(pixels, np.full_like(pixels, [255, 0, 0]), atol=3)
        assert decode(data, size=8).shape == (8, 8, 3)


def test_alpha_is_not_converted():
    pixels = np.full((1, 3, 4), (234, 51, 35, 0), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    shown = decode(encoded(pixels, icc_profile=icc.display_p3()), keep_alpha=True)
    assert shown[0, :, 3].tolist() == [0, 128, 255]
    np.testing.assert_allclose(shown[0, :, :3].astype(int), [[255, 0, 0]] * 3, atol=1)


def test_a_press_profile_says_what_its_inks_look_like():
    """Cyan of a press is no (0, 255, 255), which is what arithmetic alone makes of it."""

    def inks(cmyk):
        c, m, y, k = cmyk
        paper = np.array([255, 250, 240]) * (1 - 0.9 * k)
        return paper * [1 - 0.95 * c, 1 - 0.9 * m, 1 - 0.85 * y] * [1, 1 - 0.4 * c, 1 - 0.1 * c]

    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for form, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        data = encoded(image, form, icc_profile=icc.press(inks), **options)
        cyan = decode(data)[8, 8].astype(int)
        # Black points are matched, which moves light colours little; eight bits of Lab are 1 level.
        np.testing.assert_allclose(cyan, inks(np.array([1, 0, 0, 0])), atol=6)
        assert decode(encoded(image, form, **options))[8, 8].tolist() == [0, 255, 255]


def test_grey_by_its_profile():
    grey = Image.new("L", (2, 2), 55)  # 55 / 255 = 0.2157 of the light is sRGB's 128
    image = decode(encoded(grey, icc_profile=icc.linear_grey()))
    np.testing.assert_allclose(image.astype(int), 128, atol=1)


def test_lab_has_colours_without_a_profile():
    lab = Image.new("LAB", (2, 2), (138, 209, 198))  # L 54.3, a 80.8, b 69.9: red under D50
    red = decode(encoded(lab, "TIFF")).astype(int)
    np.testing.assert_allclose(red, np.full((2, 2, 3), [255, 0, 0]), atol=6)


def test_srgb_and_profiles_that_say_nothing_leave_every_value():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p3 = icc.display_p3()
    for profile in (
        srgb,
        b"",
        b"no profile",
        p3[:300],
        p3[:200] + b"\xff" * 200,
        icc.linear_grey(),
    ):
        np.testing.assert_array_equal(decode(encoded(PIXELS, icc_profile=profile)), PIXELS)
    grey = PIXELS[..., 0]
    image = decode(encoded(grey, icc_profile=p3))
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))


def test_random_damage_to_a_profile_never_costs_the_image():
    profile = icc.display_p3()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        harmed = bytearray(profile)
        for place in rng.integers(0, 400, 1 + seed % 5):
            harmed[place] = rng.integers(256)
        assert decode(encoded(PIXELS, icc_profile=bytes(harmed))).shape == PIXELS.shape


# --- Chunks


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"a\0b", checksum=0),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))),
        chunk(b"zTXt", b"a\0\1no such method"),
        chunk(b"iTXt", b"a\0\1\0\0\0" + b"not compressed"),
        chunk(b"iCCP", b"a\0\0not compressed"),
        chunk(b"iCCP", b"a\0\1no such method"),
        chunk(b"pHYs", b"short"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"0"),
        chunk(b"vpAg", b"of some vendor"),
        chunk(b"tIME", bytes(100_000)),
    ],
)
@pytest.mark.parametrize("after_pixels", [False, True])
def test_odd_chunks_of_a_png_cost_no_pixel(extra, after_pixels):
    data = encoded(PIXELS)
    place = len(data) - 12 if after_pixels else 33  # before IEND, or behind IHDR
    np.testing.assert_array_equal(decode(data[:place] + extra + data[place:]), PIXELS)


def test_large_texts_and_trailing_bytes_cost_no_pixel():
    texts = PngImagePlugin.PngInfo()
    for i in range(80):
        texts.add_text(f"key {i}", "x" * 1_000_000, zip=True)  # more than Pillow lets texts hold
    np.testing.assert_array_equal(decode(encoded(PIXELS, pnginfo=texts)), PIXELS)
    for form, options in LOSSLESS.items():
        data = encoded(PIXELS, form, **options) + b"trailing" * 1000
        np.testing.assert_array_equal(decode(data), PIXELS)


def test_segments_of_a_jpeg():
    data = encoded(PIXELS, "JPEG", quality=95, icc_profile=icc.display_p3(), comment=b"c" * 100)
    plain = decode(data)
    odd = b"".join(
        struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
        for marker, body in [
            (0xE1, b"Exif\0\0MM\0*" + b"\xff" * 30),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
            (0xE2, b"MPF\0" + b"\xff" * 20),
            (0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 9),
            (0xFE, b"\xff" * 60_000),
        ]
    )
    np.testing.assert_array_equal(decode(data[:2] + odd + data[2:]), plain)
    bare = without_ancillary(data[:2] + odd + data[2:], keep_profile=True)
    assert len(bare) < len(data) and b"ICC_PROFILE" in bare
    np.testing.assert_array_equal(decode(bare), plain)
    assert b"ICC_PROFILE" not in without_ancillary(data, keep_profile=False)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("keep_profile", [False, True])
def test_a_file_that_ends_early_is_still_damaged(form, keep_profile):
    data = encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), form)
    for length in (3, 9, 14, 21, 40, len(data) // 3):
        without_ancillary(data[:length], keep_profile)  # raises nothing
        with pytest.raises(DamagedImage):
            decode(data[:length])
