"""Arithmetic of embeddings z [..., dim] in numpy (unCLIP section 3)."""

from __future__ import annotations

import numpy as np

_PARALLEL = 1e-4  # radians; at smaller angles a straight line is as good, and does not divide by 0


def normalise(z: np.ndarray) -> np.ndarray:
    """Returns z [..., dim] scaled to unit length, float64; raises ValueError if a row is 0."""
    z = np.asarray(z, np.float64)
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    if not np.all(lengths > 0):
        raise ValueError("a vector of length 0 has no direction")
    return z / lengths


def project(z: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Projects z on the plane through `mean` that `components` span.

    Args:
        z: [..., dim].
        mean: [dim].
        components: k orthonormal directions [k, dim]; with k of 0 the result is the mean.

    Returns:
        float32 [..., dim].
    """
    components = np.asarray(components, np.float64)
    return (mean + (z - mean) @ components.T @ components).astype(np.float32)


def slerp(a: np.ndarray, b: np.ndarray, theta: float | np.ndarray) -> np.ndarray:
    """Interpolates from a to b along the sphere.

    With u, v the unit vectors of a, b and w the angle between them:

        direction = (sin((1 - theta) w) u + sin(theta w) v) / sin w
        length    = (1 - theta) |a| + theta |b|

    So the angle grows evenly with theta, and so does the length.

    Args:
        a, b: [..., dim].
        theta: share of the way, 0 to 1, [...].

    Returns:
        float32 [..., dim].

    Raises:
        ValueError: a vector is 0, or two are opposite: the shortest way is not unique.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    theta = np.asarray(theta, np.float64)[..., None]
    u, v = normalise(a), normalise(b)
    # tan(w / 2) = |u - v| / |u + v|. The arccos of u . v would lose half the digits of a small w.
    angle = 2 * np.arctan2(
        np.linalg.norm(u - v, axis=-1, keepdims=True), np.linalg.norm(u + v, axis=-1, keepdims=True)
    )
    if np.any(angle > np.pi - _PARALLEL):
        raise ValueError("between opposite vectors the shortest way is not unique")
    near = angle < _PARALLEL
    sine = np.sin(np.where(near, 1.0, angle))
    from_a = np.where(near, 1 - theta, np.sin((1 - theta) * angle) / sine)
    from_b = np.where(near, theta, np.sin(theta * angle) / sine)
    length = (1 - theta) * np.linalg.norm(a, axis=-1, keepdims=True) + theta * np.linalg.norm(
        b, axis=-1, keepdims=True
    )
    return (length * (from_a * u + from_b * v)).astype(np.float32)
