"""Images of any size -> what CLIP's image tower sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays
from dalle2_jax.imaging.crops import clip_square
from dalle2_jax.types import Array


def preprocess(images: np.ndarray, tower: Mapping[str, Any]) -> Array:
    """uint8 [b, h, w, 3] -> float32 [b, s, s, 3] in [-1, 1]: the middle square, resized.

    Size and filter are those of `tower` (the arguments of `nets.clip.ImageTower`).
    """
    size = tower["image_size"]
    if tower.get("resize", "area") == "bicubic":
        # On the host, as the CLIP that was trained with this filter saw its images; below they are
        # then only converted, since they have their final size already.
        images = np.stack([clip_square(image, size) for image in images])
    return shrunk(middle(images), size)


def middle(images: np.ndarray) -> np.ndarray:
    """Returns the middle square of images [b, h, w, 3]."""
    h, w = images.shape[1:3]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return images[:, top : top + side, left : left + side]


# Compiled once for each size of images.
@functools.partial(jax.jit, static_argnums=1)
def shrunk(images: Array | np.ndarray, size: int) -> Array:
    """uint8 [b, h, w, 3] -> float32 [b, size, size, 3] in [-1, 1], by the filter of training."""
    return arrays.resize(arrays.to_float(jnp.asarray(images)), size, "area")
