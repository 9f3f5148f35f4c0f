"""Images as arrays, in pure JAX: ranges, sizes, blur and crops.

Images are [b, h, w, c], float in [-1, 1]. They are uint8 only where they enter or leave a program.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["area", "bicubic", "nearest"]


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 [...] to float32 [...], 0 to -1 and 255 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Maps float [...], clipped to [-1, 1], to the nearest uint8 [...]: inverts `to_float`."""
    scaled = (jnp.clip(images.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5
    return jnp.round(scaled).astype(jnp.uint8)


def resize(images: jax.Array, size: int | tuple[int, int], method: Method = "area") -> jax.Array:
    """Resizes float [b, h, w, c] to [b, height, width, c].

    Args:
        size: the side of a square, or (height, width).
        method: "area" takes the mean over the exact area that a new pixel covers. "bicubic" is
            Keys' kernel (a = -1/2), which is widened for shrinking, so that it does not alias, as
            in Pillow; it may overshoot [-1, 1]. "nearest" takes the pixel under the new one's
            centre.

    Raises:
        ValueError: a size below 1, or an unknown method.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"resize: size {(height, width)} must be 1 pixel at least")
    b, h, w, c = images.shape
    if (height, width) == (h, w):
        return images
    if method == "nearest":
        if height % h == 0 and width % w == 0:
            return jnp.repeat(jnp.repeat(images, height // h, axis=1), width // w, axis=2)
        return images[:, _nearest(h, height)][:, :, _nearest(w, width)]
    if method == "bicubic":
        return jax.image.resize(images, (b, height, width, c), "bicubic", antialias=True)
    if method != "area":
        raise ValueError(f"resize: unknown method {method!r}; know 'area', 'bicubic', 'nearest'")
    if h % height == 0 and w % width == 0:
        # Sums of strided slices: on a CPU much faster than a reduction over two inner axes.
        fy, fx = h // height, w // width
        rows = _sum([images[:, i::fy] for i in range(fy)]) / fy  # b height w c
        return _sum([rows[:, :, j::fx] for j in range(fx)]) / fx
    rows = jnp.asarray(_area_weights(h, height), images.dtype)
    columns = jnp.asarray(_area_weights(w, width), images.dtype)
    exact = jax.lax.Precision.HIGHEST  # a TPU would otherwise multiply in bfloat16
    return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision=exact)


def _nearest(n_in: int, n_out: int) -> np.ndarray:
    """Returns the old pixel under each new pixel's centre, int [n_out].

    In whole numbers: with floats, rounding would decide where a centre is on an edge.
    """
    return (2 * np.arange(n_out) + 1) * n_in // (2 * n_out)


@functools.cache
def _area_weights(n_in: int, n_out: int) -> np.ndarray:
    """Returns each old pixel's share of each new one, [n_out, n_in], rows summing to 1."""
    edges = np.arange(n_out + 1) * (n_in / n_out)
    old = np.arange(n_in)[None, :]
    overlap = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    overlap = np.clip(overlap, 0.0, None)
    return overlap / overlap.sum(axis=1, keepdims=True)


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def gaussian_blur(
    images: jax.Array, kernel_size: int = 3, sigma: float | jax.Array = 0.6
) -> jax.Array:
    """Blurs [b, h, w, c] by a normalised Gaussian; edges are mirrored.

    The defaults are the corruption of the first upsampler's input (unCLIP, section 2.1).

    Args:
        kernel_size: taps along an axis, odd.
        sigma: standard deviation in pixels, one number or one for each image [b].
    """
    if kernel_size % 2 != 1:
        raise ValueError(f"gaussian_blur: kernel_size {kernel_size} must be odd")
    radius = kernel_size // 2
    sigma = jnp.asarray(sigma, images.dtype).reshape(-1, 1, 1, 1)
    taps = [jnp.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    total = _sum(taps)
    # A weighted sum of shifted images: a depthwise convolution is slow on CPUs.
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(images, pad, mode="reflect")
        side = images.shape[axis]
        images = _sum(
            [
                (tap / total) * jax.lax.slice_in_dim(padded, i, i + side, axis=axis)
                for i, tap in enumerate(taps)
            ]
        )
    return images


def random_offsets(key: jax.Array, batch: int, image_size: tuple[int, int], crop: int) -> jax.Array:
    """Samples the corners (y, x) of crops that fit into images, int32 [batch, 2], uniformly."""
    height, width = image_size
    if crop > min(height, width):
        raise ValueError(f"random_offsets: a crop of {crop} does not fit in {height} x {width}")
    limits = jnp.asarray([height - crop + 1, width - crop + 1])
    return jax.random.randint(key, (batch, 2), 0, limits[None, :])


def crop(images: jax.Array, offsets: jax.Array, size: int) -> jax.Array:
    """Cuts squares out of images [b, h, w, c], at corners (y, x) [b, 2] -> [b, size, size, c]."""
    window = (size, size, images.shape[-1])

    def crop_one(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), window)

    return jax.vmap(crop_one)(images, offsets)


def random_crop_pair(
    key: jax.Array, low: jax.Array, high: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Crops the same random window of an image at two resolutions.

    Windows start on a pixel of `low`, so that both show exactly the same.

    Args:
        low: [b, h, w, c].
        high: [b, f h, f w, c] for a whole factor f that divides `size`.
        size: side of the window in pixels of `high`.

    Returns:
        Crops of `low` [b, size / f, size / f, c] and of `high` [b, size, size, c].
    """
    factor, rest = divmod(high.shape[1], low.shape[1])
    if rest or high.shape[2] != low.shape[2] * factor or size % factor:
        raise ValueError(
            f"random_crop_pair: {low.shape} and {high.shape} need one whole factor that "
            f"divides the crop of {size}"
        )
    b, h, w, _ = low.shape
    offsets = random_offsets(key, b, (h, w), size // factor)
    return crop(low, offsets, size // factor), crop(high, offsets * factor, size)
