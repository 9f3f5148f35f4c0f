"""Decoding one image file -> uint8 RGB, sRGB, upright, over white.

Pillow decodes. This module adds what it leaves to the caller or gets wrong: EXIF rotation, colour
profiles, alpha and palette transparency over white, grey, CMYK, 16-bit grey (which Pillow clips to
white), the first frame of GIF, WebP and APNG. A header that claims more pixels than `MAX_PIXELS` is
refused before anything is decoded, because a small file may claim an image that fills the memory.

Pixels that are whole are never thrown away for what stands beside them. An orientation that cannot
be read is none, a profile that cannot be read is sRGB, and a file that Pillow refuses is tried
again without its comments, tags, thumbnails and profiles.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dalle2_jax.imaging.ancillary import without_ancillary
from dalle2_jax.imaging.colour import to_srgb
from dalle2_jax.imaging.crops import CENTRE, Crop, crop_resize

# Pillow warns of odd tags and thumbnails; the pixels are read all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Result = TypeVar("Result")

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LIMIT = f"above the limit of {MAX_PIXELS // 10**6} million pixels"


class DamagedImage(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode(
    data: bytes, size: int | None = None, crop: Crop = CENTRE, keep_alpha: bool = False
) -> np.ndarray:
    """Decodes the bytes of an image file.

    Args:
        data: the file's bytes.
        size: None: the whole image; else the side of the square that `crop` cuts out.
        crop: see `crops.Crop`.
        keep_alpha: whether to return RGBA in place of RGB over white.

    Returns:
        uint8 [h, w, 3], or [size, size, 3]; four channels with `keep_alpha`.

    Raises:
        DamagedImage: not an image, cut short, or above MAX_PIXELS.
    """

    def pixels_of(image: Image.Image) -> Image.Image:
        if image.format == "JPEG" and size is not None:
            # A JPEG decodes fast at a half, a quarter or an eighth of its size. Twice the size that
            # is needed is left for `crop_resize`, so that its filter decides how the result looks.
            image.draft(None, (int(2 * size / crop[0]), int(2 * size / crop[0])))
        upright = _upright(image)
        return _to_rgba(upright) if keep_alpha else _to_rgb(upright)

    pixels = _read_first_frame(data, pixels_of)
    return np.asarray(pixels) if size is None else crop_resize(pixels, size, crop)


def transparent(data: bytes) -> np.ndarray:
    """Returns where an image's alpha is 0, bool [h, w], upright; nowhere if it has no alpha.

    Raises DamagedImage as `decode` does.
    """

    def alpha_of(image: Image.Image) -> np.ndarray:
        return np.asarray(_upright(image).convert("RGBA"))[..., 3] == 0

    return _read_first_frame(data, alpha_of)


def _read_first_frame(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    """Returns `read` of the image's first frame, opened but not decoded; raises DamagedImage."""
    error_of_file = None
    bare_files = (without_ancillary(data, keep_profile) for keep_profile in (True, False))
    for file in itertools.chain([data], bare_files):
        if error_of_file is not None and file == data:
            continue
        try:
            return _read_once(file, read)
        except DamagedImage as error:
            # That of the whole file says more than those of what is left of it.
            error_of_file = error_of_file or error
    assert error_of_file is not None
    raise error_of_file


def _read_once(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    """Returns `read` of the image as the bytes are; every error becomes DamagedImage."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} x {height}, {_LIMIT}")
        image.seek(0)
        return read(image)
    except DamagedImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is higher
        raise DamagedImage(_LIMIT) from error
    except UnidentifiedImageError as error:  # Pillow's message would name a BytesIO object
        raise DamagedImage(
            f"not a readable image (cut short, or no {', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        message = " ".join(str(error).split())[:120]
        raise DamagedImage(f"not a readable image ({message})") from error
    except Exception as error:  # on hostile bytes, plugins raise struct.error, KeyError, ...
        raise DamagedImage(f"not a readable image ({type(error).__name__})") from error


# The values of EXIF's orientation, and what turns such an image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Decodes the image and turns it upright, if it says how.

    `ImageOps.exif_transpose` also writes all tags anew, which fails on a single odd one.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged tags raise struct.error, SyntaxError, KeyError, ...
        return image
    if not isinstance(orientation, int) or orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.info = image.info  # which holds the profile and the transparency
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, over white if it has alpha."""
    if image.mode.startswith("I") or image.mode == "F":  # grey of 16 or 32 bits, or floats
        wide = np.asarray(image).astype(np.float64)
        white = 65535.0 if image.mode.startswith("I") else max(1.0, float(wide.max()))
        grey = np.clip(np.round(wide * (255.0 / white)), 0, 255).astype(np.uint8)
        return to_srgb(_with_info(Image.fromarray(grey), image)).convert("RGB")
    if _has_alpha(image):
        rgba = _in_srgb(image, "RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return _in_srgb(image, "RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    return _in_srgb(image, "RGBA") if _has_alpha(image) else _to_rgb(image).convert("RGBA")


def _in_srgb(image: Image.Image, mode: str) -> Image.Image:
    """Returns an image of any mode in sRGB, of mode RGB or RGBA."""
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        # Palettes, 1 bit, YCbCr, premultiplied alpha: a profile is one of the converted colours.
        image = _with_info(image.convert(mode), image)
    elif image.mode in ("L", "RGB") and mode == "RGBA":  # one value or colour is transparent
        image = _with_info(image.convert(mode), image)
    return to_srgb(image).convert(mode)


def _with_info(image: Image.Image, source: Image.Image) -> Image.Image:
    """Returns the image with the profile of `source`, which conversions may lose."""
    image.info = {k: v for k, v in source.info.items() if k == "icc_profile"}
    return image


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
