"""Decoding one image file -> uint8 RGB, upright, over white.

Pillow decodes. This module adds what it leaves to the caller or gets wrong: EXIF rotation, alpha
and palette transparency over white, grey, CMYK, 16-bit grey (which Pillow clips to white), the
first frame of GIF, WebP and APNG. A header that claims more pixels than `MAX_PIXELS` is refused
before anything is decoded, because a small file may claim an image that fills the memory.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle2_jax.imaging.crops import CENTRE, Crop, crop_resize

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
    with _opened(data) as image:
        if image.format == "JPEG" and size is not None:
            # A JPEG decodes fast at a half, a quarter or an eighth of its size. Twice the size that
            # is needed is left for `crop_resize`, so that its filter decides how the result looks.
            image.draft(None, (int(2 * size / crop[0]), int(2 * size / crop[0])))
        upright = ImageOps.exif_transpose(image)
        pixels = _to_rgba(upright) if keep_alpha else _to_rgb(upright)
    return np.asarray(pixels) if size is None else crop_resize(pixels, size, crop)


def transparent(data: bytes) -> np.ndarray:
    """Returns where an image's alpha is 0, bool [h, w], upright; nowhere if it has no alpha.

    Raises DamagedImage as `decode` does.
    """
    with _opened(data) as image:
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.convert("RGBA"))[..., 3] == 0


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Yields the image's first frame; errors in the block become DamagedImage."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(f"{width} x {height}, {_LIMIT}")
        image.seek(0)
        yield image
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, over white if it has alpha."""
    if image.mode.startswith("I") or image.mode == "F":  # grey of 16 or 32 bits, or floats
        wide = np.asarray(image).astype(np.float64)
        white = 65535.0 if image.mode.startswith("I") else max(1.0, float(wide.max()))
        grey = np.clip(np.round(wide * (255.0 / white)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    return image.convert("RGBA") if _has_alpha(image) else _to_rgb(image).convert("RGBA")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
