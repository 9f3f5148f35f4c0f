"""Preview images of training, laid out so that progress can be seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle2_jax.imaging import arrays
from dalle2_jax.nets.clip import normalise
from dalle2_jax.types import Array, Batch

_NEAREST = 4


def first(batch: Batch, rows: int) -> Batch:
    """The first `rows` examples of a batch."""
    return jax.tree.map(lambda x: x[:rows], batch)


def side_by_side(*columns: Array) -> Array:
    """Images [b, h, w, 3] in [-1, 1] of one size -> uint8 [b, columns, h, w, 3]."""
    return arrays.to_uint8(jnp.stack(columns, axis=1))


def nearest(images: Array, z_img: Array, z: Array) -> Array:
    """Lays out, for each row, the true image and then the images nearest to z.

    images [b, h, w, 3] in [-1, 1] have z_img [b, d]; z [r, d] belongs to the first r of them. Only
    directions count. A z is right if the second column of its row equals the first.
    """
    order = jnp.argsort(-z @ normalise(z_img).T, axis=1)[:, :_NEAREST]  # r k
    # order.T: one array of images a rank, from the nearest on.
    return side_by_side(images[: len(z)], *(images[column] for column in order.T))
