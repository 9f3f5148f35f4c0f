"""Blur, resize, noise and JPEG of one image, all computed as one set of four matrix products.

A chain of degradations has a random order, so in a `scan` over it every step may be any operation.
Under `vmap` a `lax.switch` computes all branches, and would pay for each of them. So the operations
are brought into one form. Each is linear in both axes, but for a pointwise step in between:

    z = A x A^T            analysis     x [3, n, n], A [m, n]
    z = pointwise(z)
    y = S z S^T            synthesis    S [n, m]

             A                                   pointwise                           S
    blur     Fourier transform, mirrored edges   times the kernel's transform        its inverse
    JPEG     8 x 8 DCT; chroma halved            rounded to the quantisation steps   its inverse
    resize   weights of old pixels in new ones   none                                identity

Only the matrices and the pointwise step are chosen by the kind of operation, so all kinds together
cost four matrix products for each step.

Array shapes cannot change within a `scan` either. An image of `side` pixels is at the top left of a
canvas [3, n, n] whose n is constant, and `side` is carried along with it. What is beyond the image
on its canvas never affects it: the matrices mirror or repeat the image's own edge.

Images are float in [-1, 1], square and RGB.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["bilinear", "bicubic", "area", "nearest"]
METHODS: tuple[Method, ...] = ("bilinear", "bicubic", "area", "nearest")
BLUR, RESIZE, NOISE, JPEG, NOTHING = range(5)  # kinds of operation
RADIUS = 12
"""Radius of the largest blur kernel, 25 x 25."""

# RGB in [-1, 1] -> luma and chroma in [-1, 1]: JFIF 1.02.
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
# JPEG's quantisation tables at quality 50: ITU-T T.81, annex K.1.
LUMA_TABLE = """
    16 11 10 16 24  40  51  61   12 12 14 19  26  58  60  55   14 13 16 24  40  57  69 56
    14 17 22 29 51  87  80  62   18 22 37 56  68 109 103  77   24 35 55 64  81 104 113 92
    49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99
"""
CHROMA_TABLE = """
    17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99   24 26 56 99 99 99 99 99
    47 66 99 99 99 99 99 99   99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
"""


class Operation(NamedTuple):
    """One operation, or several along a leading axis.

    Attributes:
        kind: BLUR, RESIZE, NOISE, JPEG or NOTHING.
        kernel: of BLUR, [2 RADIUS + 1, 2 RADIUS + 1], the same when turned by 180 degrees.
        size: of RESIZE, the side of the result in pixels, at most n.
        method: of RESIZE, an index of METHODS. Like OpenCV's, "bilinear" and "bicubic" do not
            smooth an image that they shrink.
        sigma: of RESIZE by "nearest", the standard deviation of the Gaussian before it, in old
            pixels; a small one takes the nearest pixel.
        quality: of JPEG, 1 to 100, as libjpeg has it, with chroma subsampled (4:2:0).
    """

    kind: jax.Array
    kernel: jax.Array
    size: jax.Array
    method: jax.Array
    sigma: jax.Array
    quality: jax.Array


def operation(
    kind: int,
    *,
    kernel: jax.Array | None = None,
    size: int | jax.Array = 1,
    method: int | jax.Array = 0,
    sigma: float | jax.Array = 1.0,
    quality: int | jax.Array = 50,
) -> Operation:
    """Returns one `Operation`; parameters that its kind does not use may be left out."""
    if kernel is None:
        kernel = jnp.zeros((2 * RADIUS + 1, 2 * RADIUS + 1))
    return Operation(kind, kernel, size, method, sigma, quality)  # type: ignore[arg-type]


def operate(
    x: jax.Array, side: jax.Array, op: Operation, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Applies one operation.

    Args:
        x: the canvas [3, n, n]; the image is at its top left.
        side: int, the image's side in pixels.
        op: the operation.
        noise: [3, n, n], what NOISE adds.

    Returns:
        The canvas with the new image, clipped to [-1, 1], and the new image's side.
    """
    n = x.shape[-1]
    bases = _bases(n)
    is_blur, is_resize, is_jpeg = (op.kind == kind for kind in (BLUR, RESIZE, JPEG))
    new_side = jnp.where(is_resize, op.size, side)

    # Beyond the image's edge a blur sees it mirrored, and JPEG fills blocks with its last pixel.
    fourier = _matmul(bases.fourier, _mirror(n, side, len(bases.fourier[0])))
    luma, chroma = (_matmul(basis, _repeat_last(n, side)) for basis in bases.dct)
    weights = _resize_weights(n, side, new_side, op.method, op.sigma)
    weights = jnp.pad(weights, ((0, len(fourier) - n), (0, 0)))
    # NOISE and NOTHING are a resize to the same size, which changes nothing.
    linear = jnp.where(is_blur, fourier, weights)
    analysis = [jnp.where(is_jpeg, dct, linear) for dct in (luma, chroma, chroma)]
    inverse = jnp.where(is_blur, bases.fourier_inverse, jnp.eye(n, len(fourier)))
    luma, chroma = bases.dct_inverse, _matmul(_double_chroma(n, side), bases.chroma_inverse)
    synthesis = [jnp.where(is_jpeg, dct, inverse) for dct in (luma, chroma, chroma)]

    # All in luma and chroma: for the other operations, a change of basis that is undone.
    z = _on_both_axes(jnp.stack(analysis), _matmul(TO_YCC, x.reshape(3, -1)).reshape(x.shape))
    quantised = _quantised(z, bases.table, op.quality)
    z = jnp.where(is_blur, _filtered(z, op.kernel), jnp.where(is_jpeg, quantised, z))
    x = _on_both_axes(jnp.stack(synthesis), z)
    x = _matmul(np.linalg.inv(TO_YCC), x.reshape(3, -1)).reshape(x.shape)
    x = x + jnp.where(op.kind == NOISE, noise, 0.0)
    return jnp.clip(x, -1.0, 1.0), new_side


class _Bases(NamedTuple):
    """The constant matrices for a canvas of n, padded to whole blocks for JPEG."""

    fourier: np.ndarray  # [m, period]: cosines, then sines
    fourier_inverse: np.ndarray  # [n, m]
    dct: np.ndarray  # [2, m, padded]: of luma, and of chroma halved by means of two pixels
    dct_inverse: np.ndarray  # [n, m], of luma
    chroma_inverse: np.ndarray  # [padded / 2, m], of halved chroma
    table: np.ndarray  # [3, m, m]: the quantisation tables, repeated over all blocks


@functools.cache
def _bases(n: int) -> _Bases:
    # The image is put on a circle of `period` pixels, with RADIUS mirrored ones at each end.
    period = n + 2 * RADIUS + n % 2
    frequencies = np.arange(period // 2 + 1)
    m = 2 * len(frequencies)
    angles = 2 * np.pi * np.outer(frequencies, np.arange(period)) / period
    fourier = np.concatenate([np.cos(angles), np.sin(angles)])
    is_single = (frequencies == 0) | (2 * frequencies == period)  # without a negative counterpart
    scale = np.where(is_single, 1.0, 2.0) / period
    inverse = (fourier * np.concatenate([scale, scale])[:, None]).T[:n]

    padded = _padded(n)
    k, i = np.mgrid[:8, :8]
    block = np.where(k == 0, 0.5, 1.0) ** 0.5 / 2 * np.cos(np.pi * (2 * i + 1) * k / 16)
    luma = np.kron(np.eye(padded // 8), block)
    half_chroma = np.kron(np.eye(padded // 16), block)
    halve = np.kron(np.eye(padded // 2), [[0.5, 0.5]])
    dct, dct_inverse = np.zeros((2, m, padded)), np.zeros((n, m))
    dct[0, :padded], dct[1, : padded // 2] = luma, half_chroma @ halve
    dct_inverse[:, :padded] = luma.T[:n]
    chroma_inverse = np.pad(half_chroma.T, ((0, 0), (0, m - len(half_chroma))))

    tables = [np.array(t.split(), float).reshape(8, 8) for t in (LUMA_TABLE, CHROMA_TABLE)]
    blocks = -(-m // 8)
    table = np.stack([np.tile(tables[c], (blocks, blocks))[:m, :m] for c in (0, 1, 1)])
    matrices = (fourier, inverse, dct, dct_inverse, chroma_inverse, table)
    return _Bases(*(matrix.astype(np.float32) for matrix in matrices))


def _padded(n: int) -> int:
    """Returns n rounded up to whole blocks of 8 x 8 in halved chroma."""
    return -(-n // 16) * 16


def _mirror(n: int, side: jax.Array, period: int) -> jax.Array:
    """Returns [period, n], 1 where a pixel of the circle shows one of the image, edges mirrored.

    The circle begins with the image and ends with the RADIUS pixels before it.
    """
    i = jnp.arange(period)
    i = jnp.where(i < period - RADIUS, i, i - period)
    turn = jnp.maximum(2 * (side - 1), 1)
    i = i % turn
    return jax.nn.one_hot(jnp.minimum(i, turn - i) * (side > 1), n)


def _repeat_last(n: int, side: jax.Array) -> jax.Array:
    """Returns [padded, n], the identity, with the image's last pixel repeated behind its end."""
    return jax.nn.one_hot(jnp.minimum(jnp.arange(_padded(n)), side - 1), n)


def _double_chroma(n: int, side: jax.Array) -> jax.Array:
    """Returns [n, padded / 2], which doubles chroma as libjpeg does.

    A new pixel is 3/4 of the nearer old one and 1/4 of the next.
    """
    new, halved = jnp.arange(n), _padded(n) // 2
    last = (side + 1) // 2 - 1
    near = jnp.minimum(new // 2, last)
    next_ = jnp.clip((new - 1) // 2 + new % 2, 0, last)
    return 0.75 * jax.nn.one_hot(near, halved) + 0.25 * jax.nn.one_hot(next_, halved)


def _resize_weights(
    n: int, side: jax.Array, new_side: jax.Array, method: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Returns the weights of old pixels (columns) in new ones (rows), [n, n], rows summing to 1."""
    scale = side / new_side
    new, old = jnp.arange(n)[:, None], jnp.arange(n)[None]
    offset = old + 0.5 - (new + 0.5) * scale  # of an old pixel's centre from a new one's
    d = abs(offset)
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2  # Keys, a = -1/2
    lower, upper = jnp.maximum(-scale / 2, offset - 0.5), jnp.minimum(scale / 2, offset + 0.5)
    kernels = {
        "bilinear": jnp.maximum(1 - d, 0),
        "bicubic": jnp.where(d < 1, near, jnp.where(d < 2, far, 0.0)),
        "area": jnp.maximum(upper - lower, 0),
        # Scaled so that the largest weight is 1, even if every pixel is many sigmas away.
        "nearest": jnp.exp(-0.5 * (d**2 - jnp.min(d, axis=1, keepdims=True) ** 2) / sigma**2),
    }
    weights = jnp.stack([kernels[name] for name in METHODS])[method]
    weights = jnp.where(old < side, weights, 0.0)
    weights = jnp.where(new < new_side, weights, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _filtered(z: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves an image, given its cosines and sines along both axes [3, m, m], with a kernel.

    The kernel is the same when turned by 180 degrees, so convolution takes

        cos(f y) cos(g x)  to  P cos(f y) cos(g x) + R sin(f y) sin(g x),

    where P sums kernel cos cos and R sums kernel sin sin, and likewise the other three products. So
    each coefficient is P times itself, plus or minus R times the one with cosines and sines
    swapped.
    """
    half = z.shape[-1] // 2
    radius = kernel.shape[-1] // 2
    taps = 2 * np.pi * np.outer(np.arange(half), np.arange(-radius, radius + 1)) / (2 * half - 2)
    sums = [_matmul(_matmul(wave(taps), kernel), wave(taps).T) for wave in (np.cos, np.sin)]
    p, r = (jnp.tile(part, (1, 2, 2)) for part in sums)
    sign = np.kron([[1.0, -1.0], [-1.0, 1.0]], np.ones((1, half, half)))
    return p * z + sign * r * jnp.roll(z, (half, half), axis=(-2, -1))


def _quantised(z: jax.Array, table: np.ndarray, quality: jax.Array) -> jax.Array:
    """Rounds DCT coefficients [3, m, m] to multiples of libjpeg's steps at a quality."""
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    steps = jnp.clip((table * percent + 50) // 100, 1, 255)
    # libjpeg subtracts 128 from luma where the range [-1, 1] here subtracts 127.5: half a level,
    # which is 4 in the constant coefficient of a block.
    is_constant = np.arange(z.shape[-1]) % 8 == 0
    offset = np.zeros_like(table)
    offset[0] = -4.0 * np.outer(is_constant, is_constant)
    return (jnp.round((z * 127.5 + offset) / steps) * steps - offset) / 127.5


def _matmul(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """Multiplies in float32 on every machine: a TPU's bfloat16 would be visible."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _on_both_axes(a: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a x a^T of each channel: [3, m, n], [3, n, n] -> [3, m, m]."""
    return _matmul(_matmul(a, x), a.swapaxes(-1, -2))
