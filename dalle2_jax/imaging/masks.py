"""Known parts of images: the random masks of training, and pasting known pixels back.

GLIDE (2112.10741, section 2.3) erases random regions of training images, so that a network learns
to generate them from the rest. A `known_mask` is True, or 1, where pixels are known and kept, and
False, or 0, where they are generated.

A partly known image is float [b, h, w, 4]: colours in [-1, 1], 0 where they are unknown, and the
known_mask. Where users pass one in, it is uint8 [b, h, w, 4], and known where alpha is 255.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays
from dalle2_jax.types import Array

_BOXES, _STROKES, _SIDES = range(3)  # kinds of erased regions
_MAX_BOXES, _MAX_STROKES, _BENDS = 3, 3, 4
_INVERTED = 0.3  # of the masks of boxes and strokes


def random_known_masks(key: Array, batch: int, size: int) -> Array:
    """Samples masks for training, float32 [batch, size, size, 1]; 1 is known.

    Each erases boxes, strokes of a brush or whole sides, with equal chances. Some are inverted, so
    that only a box or a stroke is known: that is how an image is extended. All lengths are shares
    of the side, so that masks cover the same at every size.
    """
    key_kind, key_boxes, key_strokes, key_sides, key_invert = jax.random.split(key, 5)
    kind = jax.random.randint(key_kind, (batch, 1, 1), 0, 3)
    position = (jnp.arange(size) + 0.5) / size
    erased = jnp.select(
        [kind == _BOXES, kind == _STROKES],
        [_boxes(key_boxes, batch, position), _strokes(key_strokes, batch, position)],
        _sides(key_sides, batch, position),
    )
    inverted = jax.random.uniform(key_invert, (batch, 1, 1)) < _INVERTED
    return (erased == (inverted & (kind != _SIDES))).astype(jnp.float32)[..., None]


def _boxes(key: Array, batch: int, position: Array) -> Array:
    """Samples bool [b, h, w], True in one to three boxes, each of 0.15 to 0.7 of the side."""
    key_count, key_corner, key_side = jax.random.split(key, 3)
    count = jax.random.randint(key_count, (batch, 1), 1, _MAX_BOXES + 1)
    side = jax.random.uniform(key_side, (batch, _MAX_BOXES, 2), minval=0.15, maxval=0.7)
    corner = jax.random.uniform(key_corner, (batch, _MAX_BOXES, 2)) * (1 - side)
    low, high = corner[..., None], (corner + side)[..., None]
    inside = (low <= position[None, None, None]) & (position[None, None, None] < high)  # b k 2 size
    # A box is where its rows meet its columns.
    boxes = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]  # b k h w
    exists = jnp.arange(_MAX_BOXES)[None] < count
    return (boxes & exists[..., None, None]).any(axis=1)


def _strokes(key: Array, batch: int, position: Array) -> Array:
    """Samples bool [b, h, w], True in one to three bent strokes of 0.06 to 0.24 of the side."""
    key_count, key_start, key_step, key_radius = jax.random.split(key, 4)
    count = jax.random.randint(key_count, (batch, 1), 1, _MAX_STROKES + 1)
    start = jax.random.uniform(key_start, (batch, _MAX_STROKES, 1, 2), minval=0.1, maxval=0.9)
    steps = 0.2 * jax.random.normal(key_step, (batch, _MAX_STROKES, _BENDS, 2))
    points = jnp.concatenate([start, jnp.clip(start + jnp.cumsum(steps, axis=2), 0, 1)], axis=2)
    radius = jax.random.uniform(key_radius, (batch, _MAX_STROKES), minval=0.03, maxval=0.12)
    pixels = jnp.stack(jnp.meshgrid(position, position, indexing="ij"), axis=-1)  # h w 2
    # A stroke is everything near its polyline; one segment at a time, to save memory.
    erased = jnp.zeros((batch, len(position), len(position)), bool)
    for stroke in range(_MAX_STROKES):
        for bend in range(_BENDS):
            a, b = points[:, stroke, bend], points[:, stroke, bend + 1]
            near = _distance(pixels, a, b) < radius[:, stroke, None, None]
            erased |= near & (stroke < count)[..., None]
    return erased


def _distance(pixels: Array, a: Array, b: Array) -> Array:
    """Returns the distances of pixels [h, w, 2] from segments between a and b [b, 2], [b, h, w]."""
    a, along = a[:, None, None], (b - a)[:, None, None]
    length = jnp.maximum((along**2).sum(axis=-1), 1e-12)
    share = jnp.clip(((pixels[None] - a) * along).sum(axis=-1) / length, 0, 1)
    return jnp.linalg.norm(pixels[None] - a - share[..., None] * along, axis=-1)


def _sides(key: Array, batch: int, position: Array) -> Array:
    """Samples bool [b, h, w], True in a strip along one side, or two that meet, each 0.2 to 0.8."""
    key_axis, key_end, key_share = jax.random.split(key, 3)
    share = jax.random.uniform(key_share, (batch, 2, 1), minval=0.2, maxval=0.8)
    at_end = jax.random.bernoulli(key_end, 0.5, (batch, 2, 1))
    position = position[None, None]
    strips = jnp.where(at_end, position > 1 - share, position < share)  # b 2 size
    axis = jax.random.randint(key_axis, (batch, 1, 1), 0, 3)  # rows, columns, both
    rows, columns = strips[:, 0, :, None], strips[:, 1, None, :]
    return ((axis != 1) & rows) | ((axis != 0) & columns)


def random_shifts(key: Array, images: Array, limit: float) -> Array:
    """Shifts images [b, h, w, c] in [-1, 1] by up to `limit` of their sides, each its own way.

    White comes in from outside.
    """
    b, h, w, c = images.shape
    max_down, max_right = round(limit * h), round(limit * w)
    pad = ((0, 0), (max_down, max_down), (max_right, max_right), (0, 0))
    padded = jnp.pad(images, pad, constant_values=1.0)
    limits = jnp.array([[2 * max_down + 1, 2 * max_right + 1]])
    corners = jax.random.randint(key, (b, 2), 0, limits)

    def cut(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))

    return jax.vmap(cut)(padded, corners)


def partly_known(images: Array, known_mask: Array) -> Array:
    """Joins images [b, h, w, 3] in [-1, 1] and a known_mask [b, h, w, 1] to [b, h, w, 4]."""
    return jnp.concatenate([images * known_mask, known_mask], axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def resize_partly_known(known: Array, size: int, border: int = 0) -> Array:
    """Resizes partly known images, uint8 [b, h, w, 4] -> float [b, size, size, 4].

    A new pixel is known only if all that it covers is, since its colour is their mean, and if so
    are all pixels up to `border` away.
    """
    known_mask = (known[..., 3:] == 255).astype(jnp.float32)
    known_mask = (arrays.resize(known_mask, size, "area") > 1 - 1e-4).astype(jnp.float32)
    neighbourhood = (1, 2 * border + 1, 2 * border + 1, 1)
    known_mask = jax.lax.reduce_window(
        known_mask, 1.0, jax.lax.min, neighbourhood, (1, 1, 1, 1), "SAME"
    )
    return partly_known(arrays.resize(arrays.to_float(known[..., :3]), size, "area"), known_mask)


def paste(
    images: np.ndarray, known_mask: np.ndarray, generated: np.ndarray, feather: int
) -> np.ndarray:
    """Returns `images` where they are known, to the bit, and `generated` elsewhere.

    The network's result fits what it knows, except for slight differences of colour, which are
    visible along a straight edge. So the step between the two at the edge is added to the generated
    pixels beside it, fading out over `feather` pixels:

        generated + (1 - distance / (feather + 1)) * step at the nearest edge

    A contour that coincides with the edge is softened as well.

    Args:
        images: uint8 [b, h, w, 3].
        known_mask: bool [h, w].
        generated: uint8 [b, h, w, 3].
        feather: in pixels; 0 leaves the step.

    Returns:
        uint8 [b, h, w, 3].
    """
    from scipy import ndimage  # late: generating from prompts does not need it

    if known_mask.all() or not known_mask.any():
        return (images if known_mask.all() else generated).copy()
    # For each pixel, the nearest known one and its distance, which is 1 just beside the edge.
    nearest: Any = ndimage.distance_transform_edt(~known_mask, return_indices=True)
    distance, (known_y, known_x) = nearest
    edge = ~known_mask & ndimage.binary_dilation(known_mask)
    _, (edge_y, edge_x) = ndimage.distance_transform_edt(~edge, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    step = images[:, known_y, known_x].astype(np.float64) - generated
    weight = np.clip(1 - distance / (feather + 1), 0, 1)[..., None]
    blended = generated + weight * step[:, edge_y, edge_x]
    blended = np.round(blended).clip(0, 255).astype(np.uint8)
    return np.where(known_mask[..., None], images, blended)
