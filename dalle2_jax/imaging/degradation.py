"""BSR degradation in pure jax: what corrupts the second upsampler's input (unCLIP section 2.1).

BSRGAN's random chain of blurs, resizes, gaussian noise and JPEG in a random order (arXiv
2103.14006, section 3), as latent diffusion runs it (2112.10752, appendix D.6): without camera
noise, which needs a model of a camera.

A picture lies at the top left of a canvas whose side never changes while its own does. Each
operation is a pointwise map between two separable bases, so that under `scan` and `vmap`, where
every branch is paid for, all of them together cost one set of four matrix products:

    blur     real Fourier transform of the mirrored picture; times the kernel's; back
    JPEG     8 x 8 DCT of luma and of halved chroma; rounded to the quantisation tables; back
    resize   the weight of each old pixel in each new one; nothing; nothing

Images are float in [-1, 1], square and RGB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays as pictures

Method = Literal["bilinear", "bicubic", "area", "nearest"]
METHODS: tuple[Method, ...] = ("bilinear", "bicubic", "area", "nearest")
BLUR, RESIZE, NOISE, JPEG, NOTHING = range(5)  # kinds of operation
RADIUS = 12  # of the largest kernel, 25 x 25

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


class Strength(NamedTuple):
    """Ranges of the random degradations; bounds are inclusive."""

    blurs: int
    spread: float  # factor on the blurs' variances (anisotropic) or sigmas (isotropic)
    noise: tuple[int, int]  # standard deviation in 255ths of the range
    quality: tuple[int, int]  # of the JPEGs


BSR = Strength(blurs=2, spread=1.0, noise=(2, 25), quality=(30, 95))
# Latent diffusion found BSRGAN's own bounds too strong and published these with its code.
BSR_LIGHT = Strength(blurs=1, spread=0.25, noise=(1, 2), quality=(80, 95))
STRENGTHS = {"bsr": BSR, "bsr_light": BSR_LIGHT}


class Operation(NamedTuple):
    """One operation of a chain, or several along a leading axis."""

    kind: jax.Array
    kernel: jax.Array  # [2 RADIUS + 1, 2 RADIUS + 1], of BLUR
    size: jax.Array  # the side after RESIZE
    method: jax.Array  # of RESIZE, an index of METHODS
    sigma: jax.Array  # of RESIZE by "nearest": its prefilter's, in old pixels
    quality: jax.Array  # of JPEG, 1 to 100


def bsr(key: jax.Array, images: jax.Array, low_size: int, strength: Strength = BSR) -> jax.Array:
    """Degrades [b, n, n, 3] to [b, low_size, low_size, 3], each example in its own way.

    What the i-th becomes depends on `key`, on i and on itself alone. Costs some 120 n^3
    multiplications a picture: give it the crops that are learned from, not whole pictures.
    """
    side = _side(images)
    if not 1 <= low_size <= side:
        raise ValueError(f"bsr: low_size {low_size} must be from 1 to the images' side, {side}")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
    degrade = functools.partial(_degrade, low_size=low_size, strength=strength)
    return _planar(lambda x: jax.vmap(degrade)(keys, x), images)


def blur(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """[b, n, n, 3] convolved with a `gaussian_kernel` [k, k], edges mirrored."""
    return _one_operation(images, BLUR, kernel=kernel)


def resize(
    images: jax.Array, size: int | jax.Array, method: Method, sigma: float | jax.Array = 0.01
) -> jax.Array:
    """[b, n, n, 3] -> [b, n, n, 3]: the picture of side `size` <= n at the top left.

    As OpenCV's, "bilinear" and "bicubic" do not smooth what they shrink. "nearest" sees the
    picture through a gaussian of `sigma`, as in section 3.2; a small one is the nearest pixel.
    """
    return _one_operation(images, RESIZE, size=size, method=METHODS.index(method), sigma=sigma)


def jpeg(images: jax.Array, quality: int | jax.Array) -> jax.Array:
    """[b, n, n, 3] as JPEG of `quality`, 1 to 100, gives it back: libjpeg's tables, 4:2:0."""
    return _one_operation(images, JPEG, quality=quality)


def gaussian_kernel(
    variances: jax.Array, angle: jax.Array, radius: jax.Array, max_radius: int = RADIUS
) -> jax.Array:
    """[2 max_radius + 1, 2 max_radius + 1], summing to 1 and zero beyond `radius`.

    `variances` [2] in pixels^2 lie along `angle`, in radians from the columns' axis (x) towards
    the rows' (y), and across it. Sampled at the pixels' middles, as in section 3.1.
    """
    y, x = jnp.mgrid[-max_radius : max_radius + 1, -max_radius : max_radius + 1]
    along = x * jnp.cos(angle) + y * jnp.sin(angle)
    across = y * jnp.cos(angle) - x * jnp.sin(angle)
    along_variance, across_variance = jnp.maximum(variances, 0.01)  # less moves nothing
    kernel = jnp.exp(-0.5 * (along**2 / along_variance + across**2 / across_variance))
    kernel *= jnp.maximum(abs(y), abs(x)) <= radius
    return kernel / kernel.sum()


def random_chain(key: jax.Array, side: jax.Array, low_size: int, strength: Strength) -> Operation:
    """The operations, [blurs + 4], in the order they are done, of a picture of `side` pixels.

    The order is uniform, but the resize to `low_size` follows the one to a random size.
    """
    n = strength.blurs + 4
    keys = iter(jax.random.split(key, 12))

    def uniform(low: float | jax.Array, high: float | jax.Array, *shape: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    factor = side / low_size
    # Section 3.1: wider kernels where more is lost.
    isotropic = uniform(0.0, 1.0, n, 1) < 0.5
    anisotropic_variances = strength.spread * uniform(0.0, 4.0 + factor, n, 2)
    sigmas = strength.spread * uniform(0.0, 2.0 + 0.2 * factor, n, 1)
    variances = jnp.where(isotropic, sigmas**2, anisotropic_variances)
    radius = jax.random.randint(next(keys), (n,), 3, RADIUS + 1)
    kernel = jax.vmap(gaussian_kernel)(variances, uniform(0.0, np.pi, n), radius)

    nearest = uniform(0.0, 1.0) < 0.25
    by_chance = jnp.where(nearest, low_size, side / uniform(1.0, 2.0 * factor)).astype(jnp.int32)
    methods = jax.random.randint(next(keys), (2,), 0, METHODS.index("nearest"))
    methods = methods.at[0].set(jnp.where(nearest, METHODS.index("nearest"), methods[0]))

    blurs = [BLUR] * strength.blurs
    may_compress = jnp.where(uniform(0.0, 1.0) < 0.9, JPEG, NOTHING)
    chain = Operation(
        kind=jnp.array([RESIZE, RESIZE, *blurs, NOISE, may_compress]),
        kernel=kernel,
        size=jnp.full(n, low_size).at[0].set(jnp.maximum(by_chance, 1)),
        method=jnp.zeros(n, jnp.int32).at[:2].set(methods),
        sigma=jnp.full(n, 0.6 * factor) * uniform(1.0 / 6.0 / factor, 1.0, n),
        quality=jax.random.randint(next(keys), (n,), strength.quality[0], strength.quality[1] + 1),
    )
    order = jax.random.permutation(next(keys), n)
    resizes = order < 2
    order = jnp.where(resizes, jnp.cumsum(resizes) - 1, order)
    return jax.tree.map(lambda x: x[order], chain)


def random_noise(key: jax.Array, side: int, levels: tuple[int, int]) -> jax.Array:
    """Gaussian noise [3, side, side]: of each channel by itself, the same in all, or correlated.

    Section 3.3, with chances of 0.4, 0.4 and 0.2; the standard deviation is a random whole number
    of 255ths of the range within `levels`, or along the correlated noise's axes up to the largest.
    """
    key_kind, key_level, key_axes, key_spread, key_noise = jax.random.split(key, 5)
    level = jax.random.randint(key_level, (), levels[0], levels[1] + 1)
    axes = _orthonormal(jax.random.normal(key_axes, (2, 3)))
    spread = jnp.sqrt(jax.random.uniform(key_spread, (3, 1)))
    mixes = [
        level * jnp.eye(3),
        level * jnp.array([[1.0, 0.0, 0.0]] * 3),
        levels[1] * (spread * axes).T,
    ]
    chances = jnp.array([0.4, 0.4, 0.2])
    mix = jnp.stack(mixes)[jax.random.choice(key_kind, 3, p=chances)] / 127.5
    return jnp.einsum("ij,jyx->iyx", mix, jax.random.normal(key_noise, (3, side, side)))


def _orthonormal(rows: jax.Array) -> jax.Array:
    """Two rows [2, 3] -> three of a rotation [3, 3]."""
    first = rows[0] / jnp.linalg.norm(rows[0])
    second = jnp.cross(first, rows[1])
    second /= jnp.linalg.norm(second)
    return jnp.stack([first, second, jnp.cross(first, second)])


def _degrade(key: jax.Array, x: jax.Array, low_size: int, strength: Strength) -> jax.Array:
    """[3, n, n] -> [3, low_size, low_size]."""
    n = x.shape[-1]
    key_half, key_smooth, key_chain, key_noise, key_last = jax.random.split(key, 5)
    side = jnp.int32(n)
    if n == 4 * low_size:  # a quarter of the pictures are halved beforehand
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


def _half(x: jax.Array, method: pictures.Method) -> jax.Array:
    """[3, n, n]: the picture at half its side, at the top left."""
    n = x.shape[-1]
    half = pictures.resize(x[..., None], n // 2, method)[..., 0]
    return jnp.pad(half, ((0, 0), (0, n - n // 2), (0, n - n // 2)))


def operation(kind: int, **given: int | float | jax.Array) -> Operation:
    """One `Operation` with those parameters that its kind looks at."""
    kernel = jnp.zeros((2 * RADIUS + 1,) * 2)
    unseen = dict(kernel=kernel, size=1, method=0, sigma=1.0, quality=50)
    return Operation(**{"kind": kind, **unseen, **given})  # type: ignore[arg-type]


def operate(
    x: jax.Array, side: jax.Array, op: Operation, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One operation on the picture of `side` at the top left of [3, n, n] -> it and its side.

    `noise` [3, n, n] is what NOISE adds. What lies beyond the picture is never seen.
    """
    n = x.shape[-1]
    bases = _bases(n)
    blurs, resizes, compresses = (op.kind == kind for kind in (BLUR, RESIZE, JPEG))
    new_side = jnp.where(resizes, op.size, side)

    # What stands beyond the picture's edge: mirrored, or the last pixel again for whole blocks.
    mirrored = _matmul(bases.fourier, _mirror(n, side, len(bases.fourier[0])))
    luma, chroma = (_matmul(basis, _repeat(n, side)) for basis in bases.dct)
    weights = _weights(n, side, new_side, op.method, op.sigma)
    weights = jnp.pad(weights, ((0, len(mirrored) - n), (0, 0)))
    # A resize to the same size changes nothing: so noise, and no operation at all.
    linear = jnp.where(blurs, mirrored, weights)
    analysis = [jnp.where(compresses, dct, linear) for dct in (luma, chroma, chroma)]
    inverse = jnp.where(blurs, bases.fourier_inverse, jnp.eye(n, len(mirrored)))
    luma, chroma = bases.dct_inverse, _matmul(_double(n, side), bases.chroma_inverse)
    synthesis = [jnp.where(compresses, dct, inverse) for dct in (luma, chroma, chroma)]

    z = _both_sides(jnp.stack(analysis), _matmul(TO_YCC, x.reshape(3, -1)).reshape(x.shape))
    quantised = _quantised(z, bases.table, op.quality)
    z = jnp.where(blurs, _filtered(z, op.kernel), jnp.where(compresses, quantised, z))
    x = _both_sides(jnp.stack(synthesis), z)
    x = _matmul(np.linalg.inv(TO_YCC), x.reshape(3, -1)).reshape(x.shape)
    x = x + jnp.where(op.kind == NOISE, noise, 0.0)
    return jnp.clip(x, -1.0, 1.0), new_side


class _Bases(NamedTuple):
    """The constant bases of a canvas of n: analysis [m, ...] and synthesis [n, m] along an axis."""

    fourier: np.ndarray  # [m, period]: cosines, then sines
    fourier_inverse: np.ndarray
    dct: np.ndarray  # [2, m, padded]: of luma, of chroma halved by means of two
    dct_inverse: np.ndarray  # [n, m], of luma
    chroma_inverse: np.ndarray  # [padded / 2, m], of halved chroma
    table: np.ndarray  # [3, m, m]: the quantisation tables over all blocks


@functools.cache
def _bases(n: int) -> _Bases:
    period = n + 2 * RADIUS + n % 2
    frequencies = np.arange(period // 2 + 1)
    m = 2 * len(frequencies)
    angles = 2 * np.pi * np.outer(frequencies, np.arange(period)) / period
    fourier = np.concatenate([np.cos(angles), np.sin(angles)])
    once = (frequencies == 0) | (2 * frequencies == period)
    shares = np.where(once, 1.0, 2.0) / period
    inverse = (fourier * np.concatenate([shares, shares])[:, None]).T[:n]

    padded = -(-n // 16) * 16
    k, i = np.mgrid[:8, :8]
    block = np.where(k == 0, 0.5, 1.0) ** 0.5 / 2 * np.cos(np.pi * (2 * i + 1) * k / 16)
    luma = np.kron(np.eye(padded // 8), block)
    small = np.kron(np.eye(padded // 16), block)
    halve = np.kron(np.eye(padded // 2), [[0.5, 0.5]])
    dct, dct_inverse = np.zeros((2, m, padded)), np.zeros((n, m))
    dct[0, :padded], dct[1, : padded // 2] = luma, small @ halve
    dct_inverse[:, :padded] = luma.T[:n]
    chroma_inverse = np.pad(small.T, ((0, 0), (0, m - len(small))))

    tables = [np.array(t.split(), float).reshape(8, 8) for t in (LUMA_TABLE, CHROMA_TABLE)]
    blocks = -(-m // 8)
    table = np.stack([np.tile(tables[c], (blocks, blocks))[:m, :m] for c in (0, 1, 1)])
    arrays = (fourier, inverse, dct, dct_inverse, chroma_inverse, table)
    return _Bases(*(a.astype(np.float32) for a in arrays))


def _double(n: int, side: jax.Array) -> jax.Array:
    """[n, n padded / 2]: chroma doubled as in libjpeg, 3/4 of the nearer pixel, 1/4 of the next."""
    new, halved = jnp.arange(n), -(-n // 16) * 8
    next_ = jnp.clip((new - 1) // 2 + new % 2, 0, (side + 1) // 2 - 1)
    near = jnp.minimum(new // 2, (side + 1) // 2 - 1)
    return 0.75 * jax.nn.one_hot(near, halved) + 0.25 * jax.nn.one_hot(next_, halved)


def _mirror(n: int, side: jax.Array, period: int) -> jax.Array:
    """[period, n]: pixels of a circle -> those of the picture that show there, its edges mirrored.

    The circle begins with the picture and ends with the RADIUS pixels before it.
    """
    i = jnp.arange(period)
    i = jnp.where(i < period - RADIUS, i, i - period)
    turn = jnp.maximum(2 * (side - 1), 1)
    i = i % turn
    return jax.nn.one_hot(jnp.minimum(i, turn - i) * (side > 1), n)


def _repeat(n: int, side: jax.Array) -> jax.Array:
    """[n padded to whole blocks, n]: the picture's last pixel again wherever it has ended."""
    return jax.nn.one_hot(jnp.minimum(jnp.arange(-(-n // 16) * 16), side - 1), n)


def _weights(
    n: int, side: jax.Array, new_side: jax.Array, method: jax.Array, sigma: jax.Array
) -> jax.Array:
    """[n, n]: the weight of each old pixel (columns) in each new one, rows summing to 1."""
    scale = side / new_side
    new, old = jnp.arange(n)[:, None], jnp.arange(n)[None]
    distance = old + 0.5 - (new + 0.5) * scale
    d = abs(distance)
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2  # Keys, a = -1/2
    lower, upper = jnp.maximum(-scale / 2, distance - 0.5), jnp.minimum(scale / 2, distance + 0.5)
    kernels = [
        jnp.maximum(1 - d, 0),
        jnp.where(d < 1, near, jnp.where(d < 2, far, 0.0)),
        jnp.maximum(upper - lower, 0),
        # Largest 1 even where every pixel is many sigmas away.
        jnp.exp(-0.5 * (d**2 - jnp.min(d, axis=1, keepdims=True) ** 2) / sigma**2),
    ]
    weights = jnp.where(old < side, jnp.stack(kernels)[method], 0.0)
    weights = jnp.where(new < new_side, weights, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _filtered(z: jax.Array, kernel: jax.Array) -> jax.Array:
    """[3, m, m] of cosines and sines, of a picture -> of its convolution with the kernel.

    The kernel is the same seen from both ends, so cos f y cos g x becomes P of itself and R of
    sin f y sin g x, where P sums kernel cos cos and R kernel sin sin, and so on in turn.
    """
    half = z.shape[-1] // 2
    radius = kernel.shape[-1] // 2
    taps = 2 * np.pi * np.outer(np.arange(half), np.arange(-radius, radius + 1)) / (2 * half - 2)
    both = [_matmul(_matmul(wave(taps), kernel), wave(taps).T) for wave in (np.cos, np.sin)]
    kept, swapped = (jnp.tile(part, (1, 2, 2)) for part in both)
    sign = np.kron([[1.0, -1.0], [-1.0, 1.0]], np.ones((1, half, half)))
    return kept * z + sign * swapped * jnp.roll(z, (half, half), axis=(-2, -1))


def _quantised(z: jax.Array, table: np.ndarray, quality: jax.Array) -> jax.Array:
    """[3, m, m] of 8 x 8 blocks, rounded to multiples of libjpeg's table at that quality."""
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    steps = jnp.clip((table * percent + 50) // 100, 1, 255)
    # Blocks hold luma less 128, ours is less 127.5.
    first = np.arange(z.shape[-1]) % 8 == 0
    offset = np.zeros_like(table)
    offset[0] = -4.0 * np.outer(first, first)
    return (jnp.round((z * 127.5 + offset) / steps) * steps - offset) / 127.5


def _matmul(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """In float32 on every machine: a TPU's bfloat16 would show."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _both_sides(a: jax.Array, x: jax.Array) -> jax.Array:
    """a x a^T of each channel: [3, m, n], [3, n, n] -> [3, m, m]."""
    return _matmul(_matmul(a, x), a.swapaxes(-1, -2))


def _one_operation(images: jax.Array, kind: int, **given: int | float | jax.Array) -> jax.Array:
    side = jnp.int32(_side(images))

    def one(x: jax.Array) -> jax.Array:
        return operate(x, side, operation(kind, **given), jnp.zeros_like(x))[0]

    return _planar(jax.vmap(one), images)


def _planar(apply: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    return jnp.moveaxis(apply(jnp.moveaxis(images.astype(jnp.float32), -1, 1)), 1, -1)


def _side(images: jax.Array) -> int:
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"degradation: images of {images.shape}: [b, n, n, 3] is needed")
    return images.shape[1]
