"""Known parts of images: the random masks of training, and pasting known pixels back.

GLIDE (2112.10741, section 2.3) erases random regions of training images. A `known_mask` is float
[b, h, w, 1], 1 where pixels are known (kept) and 0 where they are generated. An image that is known
in part is [b, h, w, 4]: its colours in [-1, 1], 0 where unknown, and the mask.
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
_MOST_BOXES, _MOST_STROKES, _BENDS = 3, 3, 4


def random_masks(key: Array, batch: int, size: int) -> Array:
    """float32 [batch, size, size, 1]: boxes, strokes of a brush, or whole sides erased; or all but
    that, which is how a picture is extended."""
    key_kind, key_boxes, key_strokes, key_sides, key_turn = jax.random.split(key, 5)
    kind = jax.random.randint(key_kind, (batch, 1, 1), 0, 3)
    place = (jnp.arange(size) + 0.5) / size
    erased = jnp.select(
        [kind == _BOXES, kind == _STROKES],
        [_boxes(key_boxes, batch, place), _strokes(key_strokes, batch, place)],
        _sides(key_sides, batch, place),
    )
    turned = (kind != _SIDES) & (jax.random.uniform(key_turn, (batch, 1, 1)) < 0.3)
    return (erased == turned).astype(jnp.float32)[..., None]


def _boxes(key: Array, batch: int, place: Array) -> Array:
    """bool [b, h, w]: one to three boxes, each of 0.15 to 0.7 of the side."""
    key_count, key_corner, key_side = jax.random.split(key, 3)
    count = jax.random.randint(key_count, (batch, 1), 1, _MOST_BOXES + 1)
    side = jax.random.uniform(key_side, (batch, _MOST_BOXES, 2), minval=0.15, maxval=0.7)
    corner = jax.random.uniform(key_corner, (batch, _MOST_BOXES, 2)) * (1 - side)
    low, high = corner[..., None], (corner + side)[..., None]
    inside = (low <= place[None, None, None]) & (place[None, None, None] < high)  # b k 2 size
    each = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]  # b k h w
    there = jnp.arange(_MOST_BOXES)[None] < count
    return (each & there[..., None, None]).any(axis=1)


def _strokes(key: Array, batch: int, place: Array) -> Array:
    """bool [b, h, w]: one to three bent strokes, 0.03 to 0.12 of the side to either side."""
    key_count, key_start, key_way, key_width = jax.random.split(key, 4)
    count = jax.random.randint(key_count, (batch, 1), 1, _MOST_STROKES + 1)
    start = jax.random.uniform(key_start, (batch, _MOST_STROKES, 1, 2), minval=0.1, maxval=0.9)
    way = 0.2 * jax.random.normal(key_way, (batch, _MOST_STROKES, _BENDS, 2))
    points = jnp.concatenate([start, jnp.clip(start + jnp.cumsum(way, axis=2), 0, 1)], axis=2)
    width = jax.random.uniform(key_width, (batch, _MOST_STROKES), minval=0.03, maxval=0.12)
    pixels = jnp.stack(jnp.meshgrid(place, place, indexing="ij"), axis=-1)  # h w 2
    erased = jnp.zeros((batch, len(place), len(place)), bool)
    for stroke in range(_MOST_STROKES):
        for bend in range(_BENDS):
            a, b = points[:, stroke, bend], points[:, stroke, bend + 1]
            near = _distance(pixels, a, b) < width[:, stroke, None, None]
            erased |= near & (stroke < count)[..., None]
    return erased


def _distance(pixels: Array, a: Array, b: Array) -> Array:
    """[b, h, w]: of pixels [h, w, 2] from the segments a to b, each [b, 2]."""
    a, along = a[:, None, None], (b - a)[:, None, None]
    length = jnp.maximum((along**2).sum(axis=-1), 1e-12)
    share = jnp.clip(((pixels[None] - a) * along).sum(axis=-1) / length, 0, 1)
    return jnp.linalg.norm(pixels[None] - a - share[..., None] * along, axis=-1)


def _sides(key: Array, batch: int, place: Array) -> Array:
    """bool [b, h, w]: a strip along one side or along two that meet, each 0.2 to 0.8 wide."""
    key_axis, key_end, key_share = jax.random.split(key, 3)
    share = jax.random.uniform(key_share, (batch, 2, 1), minval=0.2, maxval=0.8)
    far = jax.random.bernoulli(key_end, 0.5, (batch, 2, 1))
    place = place[None, None]
    one = jnp.where(far, place > 1 - share, place < share)  # b 2 size
    which = jax.random.randint(key_axis, (batch, 1, 1), 0, 3)  # rows, columns, both
    rows, columns = one[:, 0, :, None], one[:, 1, None, :]
    return ((which != 1) & rows) | ((which != 0) & columns)


def moved(key: Array, pictures: Array, most: float) -> Array:
    """Pictures [b, h, w, c] in [-1, 1], each moved by up to `most` of its sides, over white."""
    b, h, w, c = pictures.shape
    down, right = round(most * h), round(most * w)
    wide = jnp.pad(pictures, ((0, 0), (down, down), (right, right), (0, 0)), constant_values=1.0)
    start = jax.random.randint(key, (b, 2), 0, jnp.array([[2 * down + 1, 2 * right + 1]]))
    return jax.vmap(lambda p, at: jax.lax.dynamic_slice(p, (at[0], at[1], 0), (h, w, c)))(
        wide, start
    )


def partly_known(pictures: Array, mask: Array) -> Array:
    """Pictures [b, h, w, 3] in [-1, 1] and a mask [b, h, w, 1] -> [b, h, w, 4]."""
    return jnp.concatenate([pictures * mask, mask], axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def known_at(known: Array, size: int, ring: int = 0) -> Array:
    """Pictures uint8 [b, h, w, 4], known where alpha is 255, at `size` -> [b, size, size, 4]: a
    pixel is known where all that it covers is, and all of the `ring` pixels around it."""
    mask = (known[..., 3:] == 255).astype(jnp.float32)
    mask = (arrays.resize(mask, size, "area") > 1 - 1e-4).astype(jnp.float32)
    square = (1, 2 * ring + 1, 2 * ring + 1, 1)
    mask = jax.lax.reduce_window(mask, 1.0, jax.lax.min, square, (1, 1, 1, 1), "SAME")
    return partly_known(arrays.resize(arrays.to_float(known[..., :3]), size, "area"), mask)


def paste(given: np.ndarray, known: np.ndarray, drawn: np.ndarray, feather: int) -> np.ndarray:
    """`given` where it is known, to the bit, and `drawn` elsewhere, over whose first `feather`
    pixels the step between the two is spread out: at the edge there is then no line.

    The network's own drawing fits to what it knows, but for shades of a colour, which the eye sees
    along a straight edge. A contour that lies on the very edge is softened as well.

    uint8 [b, h, w, 3], bool [h, w], uint8 [b, h, w, 3] -> uint8 [b, h, w, 3].
    """
    from scipy import ndimage  # late: drawing from sentences needs none of it

    if known.all() or not known.any():
        return (given if known.all() else drawn).copy()
    nearest: Any = ndimage.distance_transform_edt(~known, return_indices=True)
    away, (known_y, known_x) = nearest  # of each pixel the nearest known one; 1 at the edge
    edge = ~known & ndimage.binary_dilation(known)
    _, (edge_y, edge_x) = ndimage.distance_transform_edt(~edge, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    step = given[:, known_y, known_x].astype(np.float64) - drawn
    share = np.clip(1 - away / (feather + 1), 0, 1)[..., None]
    mixed = drawn + share * step[:, edge_y, edge_x]
    mixed = np.round(mixed).clip(0, 255).astype(np.uint8)
    return np.where(known[..., None], given, mixed)
