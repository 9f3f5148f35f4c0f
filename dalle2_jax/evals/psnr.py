"""How near pictures come to the true ones: peak signal-to-noise ratio, upsampled and bicubic."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.imaging import arrays, degradation
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.sampling.stage import finish
from dalle2_jax.types import Array

# unCLIP, section 2.1: what the input of the first upsampler is spoilt by, and of the later ones.
SPOILT = BLURRED, DEGRADED = "blurred", "BSR, light"


def psnr(made: Array | np.ndarray, true: Array | np.ndarray) -> np.ndarray:
    """[b, h, w, 3], clipped to [-1, 1] -> dB [b]; of equal ones 120 at most."""
    error = np.asarray(jnp.clip(made, -1, 1) - true, np.float64)
    return 10 * np.log10(4 / (error**2).mean(axis=(1, 2, 3)).clip(4e-12))


def enlarged(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, h, w, 3] -> uint8 [n, size, size, 3], bicubically."""
    one_by_one = (arrays.to_float(picture[None]) for picture in pictures)
    return np.concatenate([arrays.to_uint8(arrays.resize(x, size, "bicubic")) for x in one_by_one])


def table(model: DALLE2, pictures: np.ndarray, batch_size: int, seed: int) -> str:
    """Markdown: PSNR of each upsampler by itself, from small pictures that are true (averaged down)
    and from such as the paper's training spoils, and of all in turn.

    `pictures` uint8 [n, h, w, 3], squares of the last upsampler's side or a multiple.
    """
    stages = list(model.cascade.upsamplers)
    sizes = [
        model.cascade.decoder.image_size,
        *(s.image_size for s in model.cascade.upsamplers.values()),
    ]
    ends = dict(zip(stages, itertools.pairwise(sizes), strict=True))
    lines = [
        "| from, px | to, px | the small picture | upsampled, PSNR in dB | bicubic | better by |",
        "|---|---|---|---|---|---|",
    ]
    cases = [([stage], told) for i, stage in enumerate(stages) for told in ("true", SPOILT[i > 0])]
    for part, told in cases + [(stages, "true")] * (len(stages) > 1):
        low, high = ends[part[0]][0], ends[part[-1]][1]
        ours, bicubic = [], []
        for start in range(0, len(pictures), batch_size):
            key = jax.random.fold_in(jax.random.key(seed), start)
            key, key_spoil = jax.random.split(key)
            true, small = _pair(key_spoil, pictures[start : start + batch_size], low, high, told)
            bicubic.append(psnr(arrays.resize(small, high, "bicubic"), true))
            for stage in part:
                key, key_stage = jax.random.split(key)
                keys = jax.random.split(key_stage, len(small))
                sampler = model.cascade.upsamplers[stage]
                small = finish(sampler(model.cascade.params[stage], small, keys))
            ours.append(psnr(small, true))
        a, b = np.concatenate(ours), np.concatenate(bicubic)
        error = (a - b).std() / len(a) ** 0.5
        cells = low, high, told, f"{a.mean():.1f}", f"{b.mean():.1f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {(a - b).mean():+.1f} ± {error:.1f} |")
    return "\n".join(lines)


def _pair(key: Array, pictures: np.ndarray, low: int, high: int, told: str) -> tuple[Array, Array]:
    """uint8 pictures -> float [b, high, high, 3] and the small ones [b, low, low, 3]."""
    true = arrays.resize(arrays.to_float(jnp.asarray(pictures)), high, "area")
    small = arrays.resize(true, low, "area")
    if told == BLURRED:
        small = arrays.gaussian_blur(small)
    elif told == DEGRADED:
        seen = arrays.resize(true, min(high, 4 * low), "area")  # as in `tasks.upsampler`
        small = degradation.bsr(key, seen, low, degradation.BSR_LIGHT)
    return true, small
