"""Square crops of single images, resized by Pillow: without JAX, for input pipelines and files."""

from __future__ import annotations

import numpy as np
from PIL import Image

Crop = tuple[float, float, float]
"""(scale, y, x): a square of `scale` times the shorter side, at the fractions y and x (0 to 1) of
the room that it leaves in the image."""

CENTRE: Crop = (1.0, 0.5, 0.5)


def crop_resize(image: Image.Image | np.ndarray, size: int, crop: Crop = CENTRE) -> np.ndarray:
    """Returns the square `crop` of an RGB or RGBA image, uint8 [size, size, 3 or 4].

    Whole factors are reduced by the mean of the pixels, others by Lanczos' filter. Pillow resizes
    RGBA with its alpha multiplied in, so that the colour of a transparent pixel does not bleed into
    its neighbours.
    """
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


def clip_square(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the centre square of uint8 [h, w, 3] as OpenAI's CLIP preprocesses it.

    The shorter side is resized to `size` first, by Pillow's bicubic filter, which rounds to uint8;
    then the centre [size, size, 3] is cut out.
    """
    h, w = image.shape[:2]
    shorter = min(h, w)
    width, height = (int(size * side / shorter) for side in (w, h))
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
