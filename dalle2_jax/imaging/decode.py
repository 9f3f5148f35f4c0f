"""One encoded picture -> uint8 RGB, upright, over white: Pillow, told what it gets wrong.

Taken care of: EXIF rotation, alpha and palette transparency over white, grey, CMYK, 16-bit grey
(which Pillow clips to white), the first frame of GIF, WebP and APNG, and headers that claim more
pixels than `MAX_PIXELS`, refused before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class DamagedImage(ValueError):
    """The bytes are no picture that can be used; the message says why."""


def decode(
    data: bytes,
    size: int | None = None,
    crop: tuple[float, float, float] = (1.0, 0.5, 0.5),
    keep_alpha: bool = False,
) -> np.ndarray:
    """The picture as uint8 [h, w, 3], or [size, size, 3] where `size` is given.

    With `keep_alpha` it has four channels, RGBA, in place of RGB over white.

    `crop` = (scale, y, x): a square of `scale` times the shorter side, at the fractions y and x of
    the room left, is cut out and resized to `size` (antialiased). The default is the centre square.

    Raises:
      DamagedImage: not a picture, cut short, or above MAX_PIXELS.
    """
    with _opened(data) as image:
        if image.format == "JPEG" and size is not None:
            # Decode at half, a quarter or an eighth, never below twice the wanted size.
            image.draft(None, (int(2 * size / crop[0]), int(2 * size / crop[0])))
        upright = ImageOps.exif_transpose(image)
        pixels = _to_rgba(upright) if keep_alpha else _to_rgb(upright)
    return np.asarray(pixels) if size is None else crop_resize(pixels, size, crop)


def transparent(data: bytes) -> np.ndarray:
    """Returns where an image's alpha is 0, bool [h, w], upright; nowhere if it has no alpha.

    Raises as `decode`.
    """
    with _opened(data) as image:
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.convert("RGBA"))[..., 3] == 0


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture's first frame; what goes wrong within is told as DamagedImage."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DamagedImage(
                f"{width} x {height}, above the limit of {MAX_PIXELS // 10**6} million pixels"
            )
        image.seek(0)
        yield image
    except DamagedImage:
        raise
    except Image.DecompressionBombError as e:  # Pillow's own, higher limit
        raise DamagedImage(f"above the limit of {MAX_PIXELS // 10**6} million pixels") from e
    except UnidentifiedImageError as e:  # Pillow's message names the buffer that it was given
        raise DamagedImage(
            f"not a readable picture (cut short, or no {', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
        ) from e
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise DamagedImage(f"not a readable picture ({' '.join(str(e).split())[:120]})") from e
    except Exception as e:  # Pillow's plugins raise struct.error, KeyError, ... on hostile bytes
        raise DamagedImage(f"not a readable picture ({type(e).__name__})") from e


def crop_resize(
    image: Image.Image | np.ndarray, size: int, crop: tuple[float, float, float]
) -> np.ndarray:
    """The square `crop` of an RGB or RGBA picture at `size` -> uint8 [size, size, 3 or 4]; see
    `decode`. Pillow resizes RGBA with its alpha multiplied in, so that no clear pixel's colour
    bleeds into its neighbours."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    width, height = image.size
    scale, y, x = crop
    side = max(1, round(min(width, height) * scale))
    top, left = round((height - side) * y), round((width - side) * x)
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(image.crop(box))
    method = Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS
    return np.asarray(image.resize((size, size), method, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(wide.max()))
        grey = np.clip(np.round(wide * (255.0 / top)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if _has_alpha(image):
        drawing = image.convert("RGBA")
        white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, drawing).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    return image.convert("RGBA") if _has_alpha(image) else _to_rgb(image).convert("RGBA")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
