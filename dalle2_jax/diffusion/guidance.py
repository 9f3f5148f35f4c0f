"""Classifier-free guidance and thresholding.

    out   = uncond + w (cond - uncond),  w = 1 is off                                        (1)
    static:  x_0 <- clip(x_0, -bound, bound)                                                 (2)
    dynamic: s = max(1, p-th percentile of |x_0|),  x_0 <- clip(x_0, -s, s) / s              (3)
    interval: out = cond but where low < sigma / alpha <= high                               (4)
    rescale: out <- (phi std(cond) / std(out) + 1 - phi) out,  std over an example           (5)

Sources: CFG (2207.12598) for (1), in the parametrisation of GLIDE (2112.10741) section 2.3;
Imagen (2205.11487) section 2.3 for (2) and (3); 2404.07724 section 3 for (4), where sigma is what
sigma / alpha is here; 2305.08891 section 3.4 for (5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dalle2_jax.diffusion.schedules import Schedule
from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, PyTree

Apply = Callable[[Array, Array], Array]
"""(x_t [b, ...], t [b] int32 of the training schedule) -> the network's raw output."""


def guided(
    cond: Array,
    uncond: Array,
    w: ArrayLike,
    learned_variance: bool = False,
    rescale: ArrayLike = 0.0,
) -> Array:
    """Equations (1) and (5) on raw outputs [b, ...].

    Args:
        cond, uncond: outputs with and without the condition; eps, x_0 or v alike, since all
            three are linear in each other at a given x_t.
        w: scalar or one a row, [b].
        learned_variance: the second half of the last axis is a variance, which is taken from
            `cond` as it is: extrapolating it has no meaning. (5) sees the first half alone.
        rescale: phi of (5), within 0 and 1; 0 is off.
    """
    w = jnp.asarray(w, jnp.float32)
    w = w.reshape(w.shape + (1,) * (cond.ndim - w.ndim))
    cond, uncond = cond.astype(jnp.float32), uncond.astype(jnp.float32)
    if not learned_variance:
        return _rescaled(uncond + w * (cond - uncond), cond, rescale)
    mean, variance = jnp.split(cond, 2, axis=-1)
    mean_uncond, _ = jnp.split(uncond, 2, axis=-1)
    out = _rescaled(mean_uncond + w * (mean - mean_uncond), mean, rescale)
    return jnp.concatenate([out, variance], axis=-1)


def _rescaled(out: Array, cond: Array, phi: ArrayLike) -> Array:
    """Equation (5)."""
    # A traced phi of 0 goes the long way: its factor is 0 + 1 - 0, which changes no bit.
    if isinstance(phi, int | float) and phi == 0:
        return out
    std, target_std = (a.std(axis=tuple(range(1, a.ndim)), keepdims=True) for a in (out, cond))
    # The result's std is phi std(cond) + (1 - phi) std(out): strong guidance inflates the contrast.
    return (phi * target_std / jnp.maximum(std, 1e-12) + 1 - phi) * out  # pyright: ignore[reportReturnType]


def within(schedule: Schedule, interval: tuple[float, float]) -> np.ndarray:
    """Returns where (4) guides, bool [T], for an interval (low, high) of sigma / alpha."""
    level = np.exp(-0.5 * schedule.logsnr)  # sigma / alpha
    return (interval[0] < level) & (level <= interval[1])


def guide(
    apply: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    uncond: PyTree,
    w: ArrayLike,
    learned_variance: bool = False,
    rescale: ArrayLike = 0.0,
    where: np.ndarray | Array | None = None,
) -> Apply:
    """The guided network as a function of (x_t, t) alone, one doubled batch a call.

    Args:
        apply: (x_t, t [b], condition) -> raw output; the condition a tree of arrays [b, ...].
        cond, uncond: the condition and its null, trees of one structure.
        w: guidance scale, a scalar or [b]. A Python 1 runs the conditional half only.
        learned_variance, rescale: see `guided`.
        where: bool [T] over the training schedule, see `within`: a batch that is not all there
            runs the conditional half only. None: everywhere.
    """
    if isinstance(w, int | float) and w == 1:
        # Only of a Python number can this be known while tracing.
        return lambda x_t, t: apply(x_t, t, cond)
    both = jax.tree.map(_side_by_side, cond, uncond)  # outside the loop over steps

    def guided_apply(x_t: Array, t: Array) -> Array:
        out = apply(_side_by_side(x_t, x_t), _side_by_side(t, t), both)
        out = out.reshape(-1, 2, *out.shape[1:])
        return guided(out[:, 0], out[:, 1], w, learned_variance, rescale)

    if where is None:
        return guided_apply
    inside = jnp.asarray(where)

    def alone(x_t: Array, t: Array) -> Array:
        # float32, since both branches of a `cond` must return one dtype.
        return apply(x_t, t, cond).astype(jnp.float32)

    # All t of a batch are alike when a solver calls, so one scalar decides for all rows, and a step
    # outside costs half.
    return lambda x_t, t: jax.lax.cond(inside[t].all(), guided_apply, alone, x_t, t)


def _side_by_side(a: Array, b: Array) -> Array:
    """[b, ...] and [b, ...] -> [2 b, ...], row by row.

    In a batch that is split over devices both halves of a row then stay on the same device.
    """
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def static_threshold(x_0: Array, bound: float = 1.0) -> Array:
    """Equation (2); x_0 [b, ...]."""
    return jnp.clip(x_0, -bound, bound)


def dynamic_threshold(x_0: Array, percentile: float = 99.5) -> Array:
    """Equation (3), one s an example; x_0 [b, ...], percentile in (1, 100]."""
    if not 1 < percentile <= 100:
        raise UserError(f"dynamic thresholding: percentile {percentile} is not within (1, 100]")
    # One s for all pixels and channels of an example; s >= 1 leaves images in range as they are.
    flat = jnp.abs(x_0).reshape(x_0.shape[0], -1)
    s = jnp.maximum(jnp.percentile(flat, percentile, axis=1), 1.0)
    s = s.reshape(s.shape + (1,) * (x_0.ndim - 1))
    return jnp.clip(x_0, -s, s) / s


def threshold(x_0: Array, clip: tuple[str, Any] | None) -> Array:
    """x_0 [b, ...] under clip = None | ("static", bound) | ("dynamic", percentile)."""
    if clip is None:
        return x_0
    rules = {"static": static_threshold, "dynamic": dynamic_threshold}
    if clip[0] not in rules:
        raise UserError(f"clip must be 'static' or 'dynamic', not {clip[0]!r}")
    return rules[clip[0]](x_0, clip[1])
