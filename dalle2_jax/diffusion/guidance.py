"""Classifier-free guidance and thresholding.

    out   = uncond + w (cond - uncond),  w = 1 is off                                        (1)
    static:  x_0 <- clip(x_0, -bound, bound)                                                 (2)
    dynamic: s = max(1, p-th percentile of |x_0|),  x_0 <- clip(x_0, -s, s) / s              (3)

Sources: CFG (2207.12598) for (1), in the parametrisation of GLIDE (2112.10741) section 2.3;
Imagen (2205.11487) section 2.3 for (2) and (3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, PyTree

Apply = Callable[[Array, Array], Array]
"""(x_t [b, ...], t [b] int32 of the training schedule) -> the network's raw output."""


def guided(cond: Array, uncond: Array, w: float | Array, learned_variance: bool = False) -> Array:
    """Equation (1) on raw outputs [b, ...].

    Args:
        cond, uncond: outputs with and without the condition; eps, x_0 or v alike, since all
            three are linear in each other at a given x_t.
        w: scalar or one a row, [b].
        learned_variance: the second half of the last axis is a variance, which is taken from
            `cond` as it is: extrapolating it has no meaning.
    """
    w = jnp.asarray(w, jnp.float32)
    w = w.reshape(w.shape + (1,) * (cond.ndim - w.ndim))
    cond, uncond = cond.astype(jnp.float32), uncond.astype(jnp.float32)
    if not learned_variance:
        return uncond + w * (cond - uncond)
    mean, variance = jnp.split(cond, 2, axis=-1)
    mean_uncond, _ = jnp.split(uncond, 2, axis=-1)
    return jnp.concatenate([mean_uncond + w * (mean - mean_uncond), variance], axis=-1)


def guide(
    apply: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    uncond: PyTree,
    w: float | Array,
    learned_variance: bool = False,
) -> Apply:
    """The guided network as a function of (x_t, t) alone, one doubled batch a call.

    Args:
        apply: (x_t, t [b], condition) -> raw output; the condition a tree of arrays [b, ...].
        cond, uncond: the condition and its null, trees of one structure.
        w: guidance scale, a scalar or [b]. A Python 1 runs the conditional half only.
        learned_variance: see `guided`.
    """
    if isinstance(w, int | float) and w == 1:
        return lambda x_t, t: apply(x_t, t, cond)
    both = jax.tree.map(_side_by_side, cond, uncond)

    def guided_apply(x_t: Array, t: Array) -> Array:
        out = apply(_side_by_side(x_t, x_t), _side_by_side(t, t), both)
        out = out.reshape(-1, 2, *out.shape[1:])
        return guided(out[:, 0], out[:, 1], w, learned_variance)

    return guided_apply


def _side_by_side(a: Array, b: Array) -> Array:
    """[b, ...] and [b, ...] -> [2 b, ...], row by row: of a batch that is split over devices both
    halves of a row stay on its own."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def static_threshold(x_0: Array, bound: float = 1.0) -> Array:
    """Equation (2); x_0 [b, ...]."""
    return jnp.clip(x_0, -bound, bound)


def dynamic_threshold(x_0: Array, percentile: float = 99.5) -> Array:
    """Equation (3), one s an example; x_0 [b, ...], percentile in (1, 100]."""
    if not 1 < percentile <= 100:
        raise UserError(f"dynamic thresholding: percentile {percentile} is not within (1, 100]")
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
