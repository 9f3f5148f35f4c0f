"""Peak signal-to-noise ratio: how close upsampled images come to the true ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays, degradation
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.sampling.stage import finish
from dalle2_jax.types import Array

TRUE = "true"  # a true image, averaged down
# How training degrades the small images (unCLIP section 2.1): those of the first upsampler are
# blurred, those of the later ones pass through BSR degradation.
DEGRADATIONS = BLURRED, BSR = "blurred", "BSR, light"


def psnr(generated: Array | np.ndarray, true: Array | np.ndarray) -> np.ndarray:
    """Returns the PSNR in dB of each image, float64 [b]; 120 dB at most, for equal images.

    Both are [b, h, w, 3] in [-1, 1]; `generated` is clipped to that range.
    """
    error = np.asarray(jnp.clip(generated, -1, 1) - true, np.float64)
    # The range is 2, so its square is 4; an error of 4e-12 gives the limit of 120 dB.
    return 10 * np.log10(4 / (error**2).mean(axis=(1, 2, 3)).clip(4e-12))


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [n, h, w, 3] to uint8 [n, size, size, 3] by the bicubic filter.

    Images are resized one by one: the float arrays of many at 1024 px would fill the memory.
    """
    one_by_one = (arrays.to_float(image[None]) for image in images)
    return np.concatenate([arrays.to_uint8(arrays.resize(x, size, "bicubic")) for x in one_by_one])


def table(model: DALLE2, images: np.ndarray, batch_size: int, seed: int) -> str:
    """Compares the upsamplers with bicubic interpolation.

    Each upsampler runs by itself on true small images (averaged down) and on small images that are
    degraded as in training. Where there are several, all also run one after the other.

    Args:
        images: uint8 [n, h, h, 3]; h is the last upsampler's size or a multiple of it.
        seed: seed of the samplers' noise and of the degradations.

    Returns:
        A Markdown table: mean PSNR of both in dB, and their mean difference with its standard
        error.
    """
    upsamplers = model.cascade.upsamplers
    stages = list(upsamplers)
    sizes = [model.cascade.decoder.image_size, *(s.image_size for s in upsamplers.values())]
    sizes_of = dict(zip(stages, itertools.pairwise(sizes), strict=True))  # stage -> (from, to)
    cases = [
        ([stage], kind) for i, stage in enumerate(stages) for kind in (TRUE, DEGRADATIONS[i > 0])
    ]
    if len(stages) > 1:
        cases.append((stages, TRUE))
    lines = [
        "| from, px | to, px | the small image | upsampled, PSNR in dB | bicubic | better by |",
        "|---|---|---|---|---|---|",
    ]
    for chain, kind in cases:
        low, high = sizes_of[chain[0]][0], sizes_of[chain[-1]][1]
        upsampled, bicubic = _psnr_of_chain(model, chain, images, low, high, kind, batch_size, seed)
        gain = upsampled - bicubic
        error = gain.std() / len(gain) ** 0.5
        cells = [str(low), str(high), kind, f"{upsampled.mean():.1f}", f"{bicubic.mean():.1f}"]
        lines.append(f"| {' | '.join(cells)} | {gain.mean():+.1f} ± {error:.1f} |")
    return "\n".join(lines)


def _psnr_of_chain(
    model: DALLE2,
    chain: Sequence[str],
    images: np.ndarray,
    low: int,
    high: int,
    kind: str,
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the PSNR of the upsamplers `chain` and of bicubic interpolation, each [n]."""
    upsampled, bicubic = [], []
    for start in range(0, len(images), batch_size):
        key = jax.random.fold_in(jax.random.key(seed), start)
        key, key_degrade = jax.random.split(key)
        batch = images[start : start + batch_size]
        true, small = _true_and_small(key_degrade, batch, low, high, kind)
        bicubic.append(psnr(arrays.resize(small, high, "bicubic"), true))
        for stage in chain:
            key, key_stage = jax.random.split(key)
            keys = jax.random.split(key_stage, len(small))
            sampler = model.cascade.upsamplers[stage]
            small = finish(sampler(model.cascade.params[stage], small, keys))
        upsampled.append(psnr(small, true))
    return np.concatenate(upsampled), np.concatenate(bicubic)


def _true_and_small(
    key: Array, images: np.ndarray, low: int, high: int, kind: str
) -> tuple[Array, Array]:
    """Returns uint8 images as float [b, high, high, 3] and, small, as [b, low, low, 3]."""
    true = arrays.resize(arrays.to_float(jnp.asarray(images)), high, "area")
    small = arrays.resize(true, low, "area")
    if kind == BLURRED:
        small = arrays.gaussian_blur(small)
    elif kind == BSR:
        # As in `tasks.upsampler`, which degrades images of at most 4 times the small size.
        source = arrays.resize(true, min(high, 4 * low), "area")
        small = degradation.bsr(key, source, low, degradation.BSR_LIGHT)
    return true, small
