"""Pictures as arrays, in pure jax: ranges, sizes, blur, crops.

Images are [b, h, w, c], float in [-1, 1] but for uint8 at the edges of a program.
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
    """uint8 [...] -> float32 [...], 0 to -1 and 255 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """float [...] in [-1, 1], clipped to it -> the nearest uint8 [...]; undoes `to_float`."""
    scaled = (jnp.clip(images.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5
    return jnp.round(scaled).astype(jnp.uint8)


def resize(images: jax.Array, size: int | tuple[int, int], method: Method = "area") -> jax.Array:
    """float [b, h, w, c] -> [b, height, width, c]; `size` is a side or (height, width).

    "area" is the mean over each new pixel's exact footprint, "bicubic" Keys' kernel (a = -1/2),
    widened where it shrinks, so free of aliases and as in Pillow; it may overshoot [-1, 1].
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
        # Strided sums: on a CPU many times faster than a reduction over two inner axes.
        fy, fx = h // height, w // width
        rows = _sum([images[:, i::fy] for i in range(fy)]) / fy  # b height w c
        return _sum([rows[:, :, j::fx] for j in range(fx)]) / fx
    rows = jnp.asarray(_area_weights(h, height), images.dtype)
    columns = jnp.asarray(_area_weights(w, width), images.dtype)
    exact = jax.lax.Precision.HIGHEST  # a TPU would else multiply in bfloat16
    return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision=exact)


def _nearest(n_in: int, n_out: int) -> np.ndarray:
    """[n_out]: the old pixel under each new pixel's middle, in whole numbers, so no tie is lost."""
    return (2 * np.arange(n_out) + 1) * n_in // (2 * n_out)


@functools.cache
def _area_weights(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in]: the share of each old pixel in each new one, rows summing to 1."""
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
    """Blurs [b, h, w, c] by a normalised Gaussian of `sigma` pixels, edges mirrored.

    The defaults are the corruption of the first upsampler's input (DALL-E 2, section 2.1).
    `sigma` is one number or one an image [b].
    """
    if kernel_size % 2 != 1:
        raise ValueError(f"gaussian_blur: kernel_size {kernel_size} must be odd")
    radius = kernel_size // 2
    sigma = jnp.asarray(sigma, images.dtype).reshape(-1, 1, 1, 1)
    taps = [jnp.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    total = _sum(taps)
    # A weighted sum of shifted pictures: a depthwise convolution is slow on CPUs.
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
    """Uniform corners (y, x) int32 [batch, 2] of crops that fit."""
    height, width = image_size
    if crop > min(height, width):
        raise ValueError(f"random_offsets: a crop of {crop} does not fit in {height} x {width}")
    places = jnp.asarray([height - crop + 1, width - crop + 1])
    return jax.random.randint(key, (batch, 2), 0, places[None, :])


def crop(images: jax.Array, offsets: jax.Array, size: int) -> jax.Array:
    """[b, h, w, c] and corners [b, 2] -> [b, size, size, c]."""
    window = (size, size, images.shape[-1])

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), window)

    return jax.vmap(one)(images, offsets)


def random_crop_pair(
    key: jax.Array, low: jax.Array, high: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Crops the same random window of an image at two sizes.

    `low` [b, h, w, c] and `high` [b, f h, f w, c] -> [b, size / f, size / f, c] and [b, size, size,
    c]. Windows start on a pixel of `low`, so that both show exactly the same.
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
