"""BSR degradation in pure JAX: the corruption of the second upsampler's input (unCLIP section 2.1).

An upsampler that is trained on perfect small images fails on the slightly wrong ones that the stage
before it generates. So unCLIP trains the second one on small images that went through BSRGAN's
random chain of degradations (arXiv 2103.14006, section 3), in the version of latent diffusion
(2112.10752, appendix D.6), which leaves out camera noise, as that needs a model of a camera:

    image [n, n] -> a random order of { blur, ..., resize to a random size, resize to low_size,
                                        Gaussian noise, JPEG }
                 -> JPEG -> image [low_size, low_size]

This module samples the chains. `operations` says how one operation is computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays
from dalle2_jax.imaging.operations import (
    BLUR,
    JPEG,
    METHODS,
    NOISE,
    NOTHING,
    RADIUS,
    RESIZE,
    Operation,
    operate,
    operation,
)


class Strength(NamedTuple):
    """Ranges of the random degradations; bounds are inclusive.

    Attributes:
        blurs: how many blurs a chain has.
        spread: factor on the blurs' variances (anisotropic) or standard deviations (isotropic).
        noise: standard deviation of the noise, in 255ths of the range of values.
        quality: of the JPEGs, 1 to 100.
    """

    blurs: int
    spread: float
    noise: tuple[int, int]
    quality: tuple[int, int]


BSR = Strength(blurs=2, spread=1.0, noise=(2, 25), quality=(30, 95))
# Latent diffusion found BSRGAN's own ranges too strong, and published these with its code.
BSR_LIGHT = Strength(blurs=1, spread=0.25, noise=(1, 2), quality=(80, 95))
STRENGTHS = {"bsr": BSR, "bsr_light": BSR_LIGHT}


def bsr(key: jax.Array, images: jax.Array, low_size: int, strength: Strength = BSR) -> jax.Array:
    """Degrades images, each in its own random way.

    It costs about 120 n^3 multiplications for each image, so give it the crops that are trained on
    rather than whole images. The result for the i-th image depends on `key`, i and that image only.

    Args:
        key: one PRNG key.
        images: float [b, n, n, 3] in [-1, 1].
        low_size: side of the result, 1 to n.
        strength: `BSR`, `BSR_LIGHT` or other ranges.

    Returns:
        float32 [b, low_size, low_size, 3] in [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"degradation: images of {images.shape}: [b, n, n, 3] is needed")
    side = images.shape[1]
    if not 1 <= low_size <= side:
        raise ValueError(f"bsr: low_size {low_size} must be from 1 to the images' side, {side}")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
    degrade = functools.partial(_degrade, low_size=low_size, strength=strength)
    channels_first = jnp.moveaxis(images.astype(jnp.float32), -1, 1)
    return jnp.moveaxis(jax.vmap(degrade)(keys, channels_first), 1, -1)


def _degrade(key: jax.Array, x: jax.Array, low_size: int, strength: Strength) -> jax.Array:
    """Degrades one image [3, n, n] -> [3, low_size, low_size]."""
    n = x.shape[-1]
    key_half, key_smooth, key_chain, key_noise, key_last = jax.random.split(key, 5)
    side = jnp.int32(n)
    if n == 4 * low_size:  # for a factor of 4, a quarter of the images are halved beforehand
        halve = jax.random.uniform(key_half) < 0.25
        smooth = jax.random.uniform(key_smooth) < 0.5
        x = jnp.where(halve, jnp.where(smooth, _half(x, "bicubic"), _half(x, "area")), x)
        side = jnp.where(halve, n // 2, n)
    chain = random_chain(key_chain, side, low_size, strength)
    noise = random_noise(key_noise, n, strength.noise)

    def step(carry: tuple[jax.Array, jax.Array], op: Operation):
        return operate(*carry, op, noise), None

    (x, side), _ = jax.lax.scan(step, (x, side), chain)
    x = x[:, :low_size, :low_size]
    quality = jax.random.randint(key_last, (), strength.quality[0], strength.quality[1] + 1)
    x, _ = operate(x, jnp.int32(low_size), operation(JPEG, quality=quality), jnp.zeros_like(x))
    return x


def _half(x: jax.Array, method: arrays.Method) -> jax.Array:
    """Halves an image [3, n, n]; the result is at the top left of [3, n, n]."""
    n = x.shape[-1]
    half = arrays.resize(x[..., None], n // 2, method)[..., 0]
    return jnp.pad(half, ((0, 0), (0, n - n // 2), (0, n - n // 2)))


def random_chain(key: jax.Array, side: jax.Array, low_size: int, strength: Strength) -> Operation:
    """Samples the operations for an image of `side` pixels, in order.

    Every order is equally likely, except that the resize to `low_size` follows the one to a random
    size.

    Returns:
        Operations along a leading axis [blurs + 4].
    """
    n = strength.blurs + 4
    keys = iter(jax.random.split(key, 12))

    def uniform(low: float | jax.Array, high: float | jax.Array, *shape: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    factor = side / low_size
    # Section 3.1: the kernels are wider for a larger factor.
    isotropic = uniform(0.0, 1.0, n, 1) < 0.5
    anisotropic_variances = strength.spread * uniform(0.0, 4.0 + factor, n, 2)
    sigmas = strength.spread * uniform(0.0, 2.0 + 0.2 * factor, n, 1)
    variances = jnp.where(isotropic, sigmas**2, anisotropic_variances)
    radius = jax.random.randint(next(keys), (n,), 3, RADIUS + 1)
    kernel = jax.vmap(gaussian_kernel)(variances, uniform(0.0, np.pi, n), radius)

    # Section 3.2: the first resize goes straight to `low_size` by "nearest", or to a random size.
    nearest = uniform(0.0, 1.0) < 0.25
    first_size = jnp.where(nearest, low_size, side / uniform(1.0, 2.0 * factor)).astype(jnp.int32)
    methods = jax.random.randint(next(keys), (2,), 0, METHODS.index("nearest"))
    methods = methods.at[0].set(jnp.where(nearest, METHODS.index("nearest"), methods[0]))

    blurs = [BLUR] * strength.blurs
    jpeg_or_nothing = jnp.where(uniform(0.0, 1.0) < 0.9, JPEG, NOTHING)
    chain = Operation(
        kind=jnp.array([RESIZE, RESIZE, *blurs, NOISE, jpeg_or_nothing]),
        kernel=kernel,
        size=jnp.full(n, low_size).at[0].set(jnp.maximum(first_size, 1)),
        method=jnp.zeros(n, jnp.int32).at[:2].set(methods),
        sigma=jnp.full(n, 0.6 * factor) * uniform(1.0 / 6.0 / factor, 1.0, n),
        quality=jax.random.randint(next(keys), (n,), strength.quality[0], strength.quality[1] + 1),
    )
    order = jax.random.permutation(next(keys), n)
    # The first two places that the permutation gives to resizes get them in their own order.
    resizes = order < 2
    order = jnp.where(resizes, jnp.cumsum(resizes) - 1, order)
    return jax.tree.map(lambda x: x[order], chain)


def gaussian_kernel(
    variances: jax.Array, angle: jax.Array, radius: jax.Array, max_radius: int = RADIUS
) -> jax.Array:
    """Returns a blur kernel [2 max_radius + 1, 2 max_radius + 1], summing to 1 (section 3.1).

    Args:
        variances: [2] in pixels^2, along `angle` and across it.
        angle: in radians, from the axis of columns (x) towards that of rows (y).
        radius: the kernel is 0 beyond it.
        max_radius: of the array; the kernel is sampled at the centres of its pixels.
    """
    y, x = jnp.mgrid[-max_radius : max_radius + 1, -max_radius : max_radius + 1]
    along = x * jnp.cos(angle) + y * jnp.sin(angle)
    across = y * jnp.cos(angle) - x * jnp.sin(angle)
    along_variance, across_variance = jnp.maximum(variances, 0.01)  # smaller ones blur nothing
    kernel = jnp.exp(-0.5 * (along**2 / along_variance + across**2 / across_variance))
    kernel *= jnp.maximum(abs(y), abs(x)) <= radius
    return kernel / kernel.sum()


def random_noise(key: jax.Array, side: int, levels: tuple[int, int]) -> jax.Array:
    """Samples Gaussian noise [3, side, side] of one of three kinds (section 3.3).

    With chances of 0.4, 0.4 and 0.2 the channels' noise is independent, equal, or correlated. The
    standard deviation of the first two is a random whole number of 255ths of the range within
    `levels`; that of correlated noise is random along each of three random axes, at most the
    largest of `levels`.
    """
    key_kind, key_level, key_axes, key_spread, key_noise = jax.random.split(key, 5)
    level = jax.random.randint(key_level, (), levels[0], levels[1] + 1)
    axes = _orthonormal(jax.random.normal(key_axes, (2, 3)))
    spread = jnp.sqrt(jax.random.uniform(key_spread, (3, 1)))
    # Each kind is a linear map of independent noise, [channels, 3].
    mixes = [
        level * jnp.eye(3),
        level * jnp.array([[1.0, 0.0, 0.0]] * 3),
        levels[1] * (spread * axes).T,
    ]
    chances = jnp.array([0.4, 0.4, 0.2])
    mix = jnp.stack(mixes)[jax.random.choice(key_kind, 3, p=chances)] / 127.5
    return jnp.einsum("ij,jyx->iyx", mix, jax.random.normal(key_noise, (3, side, side)))


def _orthonormal(rows: jax.Array) -> jax.Array:
    """Completes two vectors [2, 3] to the three rows of a rotation [3, 3] (Gram-Schmidt)."""
    first = rows[0] / jnp.linalg.norm(rows[0])
    second = jnp.cross(first, rows[1])
    second /= jnp.linalg.norm(second)
    return jnp.stack([first, second, jnp.cross(first, second)])
