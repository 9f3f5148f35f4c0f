"""BSR degradation: operations against SciPy, Pillow and jax.image, random choices by statistics."""

import collections
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from tolerance import EPS

from dalle2_jax.imaging import arrays, degradation, operations
from dalle2_jax.imaging.operations import BLUR, JPEG, METHODS, NOISE, NOTHING, RADIUS, RESIZE

SIDE = 32
operate = jax.jit(operations.operate)
bsr = jax.jit(degradation.bsr, static_argnames=("low_size", "strength"))
GENTLE = degradation.Strength(blurs=1, spread=0.02, noise=(0, 0), quality=(100, 100))


@jax.jit
def apply(images, op):
    """Applies one operation to images [b, n, n, 3] that fill their canvas."""
    side = jnp.int32(images.shape[1])

    def one(x):
        return operations.operate(x, side, op, jnp.zeros_like(x))[0]

    return jnp.moveaxis(jax.vmap(one)(jnp.moveaxis(images, -1, 1)), 1, -1)


def blur(images, kernel):
    return apply(images, operations.operation(BLUR, kernel=kernel))


def jpeg(images, quality):
    return apply(images, operations.operation(JPEG, quality=quality))


def resize(images, size, method, sigma=0.01):
    index = METHODS.index(method)
    return apply(images, operations.operation(RESIZE, size=size, method=index, sigma=sigma))


def smooth(side, batch=3, sigma=2.0, seed=0):
    """Returns images in [-0.9, 0.9] whose details are about `sigma` pixels wide."""
    noise = np.random.default_rng(seed).normal(size=(batch, side, side, 3))
    x = ndimage.gaussian_filter(noise, (0, sigma, sigma, 0))
    return jnp.asarray(0.9 * x / abs(x).max(axis=(1, 2, 3), keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def images():
    return smooth(SIDE)


def psnr(a, b):
    """Returns the peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return -10 * np.log10(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) / 4)


def kernel(variances, angle, radius=RADIUS):
    return degradation.gaussian_kernel(jnp.asarray(variances, jnp.float32), angle, radius)


@pytest.mark.parametrize("variances", [(4.0, 4.0), (6.0, 0.5), (0.0, 0.0), (3.0, 0.0)])
@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
def test_kernels_sum_to_one_within_their_radius(variances, angle):
    k = np.asarray(kernel(variances, angle, radius=5))
    assert k.shape == (25, 25) and k.min() >= 0
    # The sum that the weights were divided by is of 625 terms, in any order; what a kernel without
    # a limited radius has outside is 1 % and more.
    assert k.sum(dtype=float) == pytest.approx(1, abs=625 * EPS)
    inner = slice(RADIUS - 5, RADIUS + 6)
    assert k[inner, inner].sum(dtype=float) == pytest.approx(1, abs=625 * EPS)


def test_a_kernels_moments_are_its_variances_along_its_angle():
    k = np.asarray(kernel((4.0, 1.5), 0.6), float)
    y, x = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]
    covariance = [[(k * a * b).sum() for a in (x, y)] for b in (x, y)]
    turn = np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    np.testing.assert_allclose(covariance, turn @ np.diag([4.0, 1.5]) @ turn.T, atol=5e-3)


@pytest.mark.parametrize("side", [SIDE, SIDE + 1, 5])
@pytest.mark.parametrize(("variances", "angle"), [((6.0, 0.5), 0.5), ((2.0, 7.0), 2.5)])
def test_blur_is_scipys(side, variances, angle):
    x = smooth(side, sigma=0.5)
    k = kernel(variances, angle)
    ours = blur(x, k)
    want = ndimage.convolve(np.asarray(x, float), np.asarray(k)[None, :, :, None], mode="mirror")
    np.testing.assert_allclose(ours, want, atol=2e-6)


@pytest.mark.parametrize(("size", "sigma"), [(3, 0.6), (25, 2.0)])
def test_an_isotropic_blur_is_gaussian_blur(images, size, sigma):
    ours = blur(images, kernel((sigma**2, sigma**2), 1.0, size // 2))
    np.testing.assert_allclose(ours, arrays.gaussian_blur(images, size, sigma), atol=2e-6)


def test_a_blur_without_width_changes_nothing(images):
    np.testing.assert_allclose(blur(images, kernel((0.0, 0.0), 0.3)), images, atol=2e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [8, 9, 21, 32])
def test_resizes_are_jax_images(images, method, size):
    ours = resize(images, size, method)
    want = jax.image.resize(images, (3, size, size, 3), method, antialias=False)
    np.testing.assert_allclose(ours[:, :size, :size], want, atol=3e-6)


@pytest.mark.parametrize("size", [8, 11, 32])
def test_area_is_the_mean_over_the_covered_area(images, size):
    ours = resize(images, size, "area")[:, :size, :size]
    np.testing.assert_allclose(ours, arrays.resize(images, size, "area"), atol=3e-6)


def test_nearest_is_the_nearest_pixel_after_a_gaussian_of_sigma():
    x = smooth(33, sigma=0.5)
    want = jax.image.resize(x, (3, 11, 11, 3), "nearest")
    ours = resize(x, 11, "nearest")[:, :11, :11]
    np.testing.assert_allclose(ours, want, atol=3e-6)

    ours = resize(x, 11, "nearest", sigma=1.5)[:, 3:8, 3:8]
    blurred = ndimage.gaussian_filter(np.asarray(x), (0, 1.5, 1.5, 0), mode="mirror", radius=12)
    np.testing.assert_allclose(ours, blurred[:, 10:25:3, 10:25:3], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(32, 32), (9, 25)])
def test_flat_images_and_sizes_that_stay_are_not_changed(images, method, sizes):
    flat = jnp.full((3, SIDE, SIDE), 0.3)
    op = operations.operation(RESIZE, size=sizes[1], method=METHODS.index(method), sigma=0.8)
    out, side = operate(flat, jnp.int32(sizes[0]), op, flat)
    assert side == sizes[1]
    np.testing.assert_allclose(out[:, :side, :side], 0.3, atol=2e-6)
    np.testing.assert_allclose(resize(images, SIDE, method), images, atol=3e-6)


def pillow_jpeg(x, quality):
    def one(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        return np.asarray(Image.open(file))

    return arrays.to_float(jnp.stack([one(p) for p in np.asarray(arrays.to_uint8(x))]))


@pytest.mark.parametrize("quality", [30, 50, 80, 95])
@pytest.mark.parametrize("side", [64, 50])
@pytest.mark.parametrize(("sigma", "grey", "levels"), [(1.0, True, 1.7), (4.0, False, 3.6)])
def test_jpeg_is_pillows(side, quality, sigma, grey, levels):
    """But for libjpeg's whole numbers in between: it rounds the cosine transforms and the pixels,
    each to half a level of 255, and in colour also the two conversions and the halved colours."""
    x = smooth(side, sigma=sigma)
    x = arrays.to_float(arrays.to_uint8(jnp.repeat(x[..., :1], 3, axis=-1) if grey else x))
    ours, want = jpeg(x, quality), pillow_jpeg(x, quality)
    # Twice what these roundings come to with libjpeg-turbo. A rounding that falls to the other side
    # moves a coefficient by a whole step, so that bounds nearer than that hold for one build alone.
    assert 127.5 * np.sqrt(np.mean((ours - want) ** 2)) < levels
    # What JPEG loses is far more, and files of a neighbouring quality are at twice the distance.
    assert psnr(ours, want) > psnr(x, want) + 2
    assert psnr(ours, want) > psnr(jpeg(x, quality - 5), want) + 2
    assert abs(np.mean(ours - want)) < 0.25 / 127.5  # cutting in place of rounding is 0.5


def test_jpeg_loses_more_at_a_lower_quality(images):
    ratios = [psnr(jpeg(images, q), images) for q in (10, 30, 60, 95)]
    assert ratios == sorted(ratios) and ratios[-1] - ratios[0] > 6


def test_a_flat_grey_survives_jpeg():
    grey = arrays.to_float(jnp.full((1, 16, 16, 3), 77, jnp.uint8))
    np.testing.assert_allclose(jpeg(grey, 90), grey, atol=1 / 255)


OPERATIONS = {
    "blur": operations.operation(BLUR, kernel=kernel((5.0, 1.0), 0.7)),
    "jpeg": operations.operation(JPEG, quality=40),
    "bicubic": operations.operation(RESIZE, size=13, method=1),
    "nearest": operations.operation(RESIZE, size=9, method=3, sigma=1.2),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [1, 6, 16])
def test_the_canvas_beyond_the_image_does_not_affect_it(images, name, side):
    """The result on a large canvas is that on one of the image's own size."""
    around = images[0].transpose(2, 0, 1)
    image = images[1].transpose(2, 0, 1)[:, :side, :side]
    both = around.at[:, :side, :side].set(image)
    op = OPERATIONS[name]
    out, new_side = operate(both, jnp.int32(side), op, jnp.zeros_like(both))
    canvas = max(side, int(new_side))
    alone = jnp.pad(image, ((0, 0), (0, canvas - side), (0, canvas - side)))
    want, _ = operate(alone, jnp.int32(side), op, jnp.zeros_like(alone))
    new = slice(0, int(new_side))
    np.testing.assert_allclose(out[:, new, new], want[:, new, new], atol=3e-6)


def test_noise_and_nothing(images):
    x = images[0].transpose(2, 0, 1)
    noise = jax.random.normal(jax.random.key(0), x.shape)
    for kind, added in ((NOISE, noise), (NOTHING, 0.0)):
        out, side = operate(x, jnp.int32(SIDE), operations.operation(kind), noise)
        np.testing.assert_allclose(out, np.clip(x + added, -1, 1), atol=3e-6)
        assert side == SIDE


def test_noise_is_grey_independent_or_correlated():
    keys = jax.random.split(jax.random.key(0), 1500)
    noise = np.asarray(jax.vmap(lambda k: degradation.random_noise(k, 24, (2, 25)))(keys))
    planes = noise.reshape(len(keys), 3, -1) * 127.5
    assert abs(planes.mean()) < 0.1
    stds = planes.std(axis=2)
    levels = collections.defaultdict(list)
    for i, plane in enumerate(planes):
        correlations = np.corrcoef(plane)[np.triu_indices(3, 1)]
        if np.ptp(plane, axis=0).max() == 0:
            levels["grey"].append(stds[i].mean())
        elif abs(correlations).max() < 0.2 and np.ptp(stds[i]) < 0.15 * stds[i].mean():
            levels["independent"].append(stds[i].mean())
        else:
            levels["correlated"].append(np.sqrt(np.mean(stds[i] ** 2)))
    shares = {kind: len(values) / len(keys) for kind, values in levels.items()}
    # Five standard deviations of a share of 1500, 0.013 each.
    assert shares == pytest.approx({"grey": 0.4, "independent": 0.4, "correlated": 0.2}, abs=0.065)
    for kind in ("grey", "independent"):  # a whole number from 2 to 25, uniformly
        assert np.mean(levels[kind]) == pytest.approx(13.5, abs=1.5)
        # Measured on 576 pixels, a std errs by 1 / sqrt(2 * 576) = 3 %: four times that.
        assert 1.76 < np.min(levels[kind]) < 2.24 and 24 < np.max(levels[kind]) < 28
    # the mean variance of the axes, uniform up to 25^2: of 300, 2 % each
    assert np.mean(np.square(levels["correlated"])) == pytest.approx(25**2 / 2, rel=0.12)


@pytest.fixture(scope="module")
def chains():
    keys = jax.random.split(jax.random.key(3), 6000)
    sample = jax.vmap(lambda key: degradation.random_chain(key, jnp.int32(64), 16, degradation.BSR))
    return jax.tree.map(np.asarray, jax.jit(sample)(keys))


def test_every_order_is_equally_likely(chains):
    kinds = np.where(chains.kind == NOTHING, JPEG, chains.kind)
    orders = collections.Counter(map(tuple, kinds))
    assert set(orders) == set(itertools.permutations([BLUR, BLUR, RESIZE, RESIZE, NOISE, JPEG]))
    counts = np.array(list(orders.values()))  # of 180 orders, 33 each
    # chi^2 of 179 degrees of freedom, and five times its std of sqrt(2 * 179)
    assert np.sum((counts - counts.mean()) ** 2) / counts.mean() < 179 + 5 * 19
    assert np.mean(chains.kind == NOTHING) * 6 == pytest.approx(0.1, abs=0.02)


def test_a_chain_resizes_to_a_random_size_then_to_the_low_one(chains):
    sizes = chains.size[chains.kind == RESIZE].reshape(-1, 2)
    methods = chains.method[chains.kind == RESIZE].reshape(-1, 2)
    assert (sizes[:, 1] == 16).all()
    nearest = methods[:, 0] == METHODS.index("nearest")
    assert nearest.mean() == pytest.approx(0.25, abs=0.03)
    assert (sizes[nearest, 0] == 16).all()
    # 64 / U(1, 8), rounded down
    assert (sizes[~nearest, 0].min(), sizes[~nearest, 0].max()) == (8, 63)
    assert np.median(sizes[~nearest, 0]) == pytest.approx(64 / 4.5, abs=1)
    assert np.bincount(methods[:, 1]).tolist() == pytest.approx([2000] * 3, abs=150)


def test_a_chains_parameters_are_within_their_bounds(chains):
    used = {kind: chains.kind == kind for kind in (BLUR, JPEG)}
    quality = chains.quality[used[JPEG]]
    assert (quality.min(), quality.max()) == (30, 95)
    kernels = chains.kernel[used[BLUR]]
    np.testing.assert_allclose(kernels.sum((1, 2), dtype=float), 1, atol=625 * EPS)
    i = np.arange(-RADIUS, RADIUS + 1)
    y, x = np.meshgrid(i, i, indexing="ij")
    xx, yy, xy = ((kernels * w[None]).sum((1, 2)) for w in (x * x, y * y, x * y))
    assert (xx + yy).max() < 16.1  # variances of 8 each, some cut off by the radius
    wide = kernels[(xx > 3) & (yy > 3)]
    reach = {abs(i[k.any(axis=1)]).max() for k in wide}
    assert reach == set(range(3, RADIUS + 1))
    isotropic = (abs(xx - yy) < 1e-3) & (abs(xy) < 1e-3)
    assert isotropic.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.mean(xy[~isotropic] > 0) - 0.5) < 0.03  # any angle


def test_every_image_is_degraded_in_its_own_way():
    x = jnp.tile(smooth(64, batch=1), (6, 1, 1, 1))
    low = np.asarray(bsr(jax.random.key(0), x, 16, degradation.BSR))
    assert low.shape == (6, 16, 16, 3) and low.dtype == np.float32
    assert np.isfinite(low).all() and abs(low).max() <= 1
    for a, b in itertools.combinations(low, 2):
        assert np.abs(a - b).mean() > 0.005  # were they degraded alike: 0
    np.testing.assert_array_equal(bsr(jax.random.key(0), x, 16, degradation.BSR), low)
    other = bsr(jax.random.key(1), x, 16, degradation.BSR)
    assert np.abs(other - low).mean((1, 2, 3)).min() > 0.005

    # An image's result depends on no other image of its batch.
    other_rest = bsr(jax.random.key(0), x.at[4:].set(-x[4:]), 16, degradation.BSR)
    np.testing.assert_allclose(other_rest[:4], low[:4], atol=1e-5)
    np.testing.assert_allclose(
        bsr(jax.random.key(0), x[:3], 16, degradation.BSR), low[:3], atol=1e-5
    )


def test_on_a_mesh_no_image_leaves_its_chip():
    """A Fourier transform by `jnp.fft`, for example, would gather the batch."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32, sharding=place)
    text = bsr.lower(jax.random.key(0), x, 4, degradation.BSR).compile().as_text()
    assert " while(" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in text


@pytest.mark.parametrize("low_size", [16, 20, 32])
def test_a_gentle_chain_is_a_resize(low_size):
    """Nothing is shifted, turned or shaded, in any order of the operations."""
    x = smooth(64, batch=8, sigma=12.0)
    low = bsr(jax.random.key(0), x, low_size, GENTLE)
    want = arrays.resize(x, low_size, "area")
    assert min(psnr(a, b) for a, b in zip(low, want, strict=True)) > 30
    for axis in (1, 2):  # its shift in pixels, to first order
        slope = np.gradient(np.asarray(want), axis=axis)
        shift = np.sum((low - want) * slope, (1, 2, 3)) / np.sum(slope**2, (1, 2, 3))
        assert abs(shift).max() < 0.2 and abs(shift.mean()) < 0.05


def test_light_is_lighter():
    x = smooth(64, batch=8, sigma=7.0)
    want = arrays.resize(x, 16, "area")
    strong, light = (
        psnr(bsr(jax.random.key(0), x, 16, degradation.STRENGTHS[name]), want)
        for name in ("bsr", "bsr_light")
    )
    assert light > strong + 2


def test_mistakes():
    with pytest.raises(ValueError, match=r"\[b, n, n, 3\]"):
        degradation.bsr(jax.random.key(0), jnp.zeros((1, 8, 6, 3)), 4)
    with pytest.raises(ValueError, match="low_size 9 must be from 1 to the images' side, 8"):
        degradation.bsr(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), 9)
