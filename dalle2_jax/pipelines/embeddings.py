"""Arithmetic of embeddings z [..., dim] in numpy (unCLIP section 3)."""

from __future__ import annotations

import numpy as np

_PARALLEL = 1e-4  # an angle, in radians, at which a straight line serves as well


def normalise(z: np.ndarray) -> np.ndarray:
    """z [..., dim] at unit length, in float64. ValueError: one of them is 0."""
    z = np.asarray(z, np.float64)
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    if not np.all(lengths > 0):
        raise ValueError("a vector of length 0 has no direction")
    return z / lengths


def project(z: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """z [..., dim] as described by its mean and orthonormal directions [k, dim] alone: the nearest
    point of the plane through `mean`. With k of 0 that is the mean itself."""
    components = np.asarray(components, np.float64)
    return (mean + (z - mean) @ components.T @ components).astype(np.float32)


def slerp(a: np.ndarray, b: np.ndarray, theta: float | np.ndarray) -> np.ndarray:
    """The vector [..., dim] a share `theta` [...] of the way from a to b, over the sphere.

    The angle comes from the dot product of the whole vectors; it is passed at an even pace, and the
    length goes evenly from that of a to that of b. ValueError: a vector is 0, or they are opposite,
    between which there is no one way.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    theta = np.asarray(theta, np.float64)[..., None]
    u, v = normalise(a), normalise(b)
    # Of the half angle: arccos of the dot product knows small angles to half the digits alone.
    angle = 2 * np.arctan2(
        np.linalg.norm(u - v, axis=-1, keepdims=True), np.linalg.norm(u + v, axis=-1, keepdims=True)
    )
    if np.any(angle > np.pi - _PARALLEL):
        raise ValueError("between opposite vectors there is no one way")
    near = angle < _PARALLEL
    sine = np.sin(np.where(near, 1.0, angle))
    from_a = np.where(near, 1 - theta, np.sin((1 - theta) * angle) / sine)
    from_b = np.where(near, theta, np.sin(theta * angle) / sine)
    length = (1 - theta) * np.linalg.norm(a, axis=-1, keepdims=True) + theta * np.linalg.norm(
        b, axis=-1, keepdims=True
    )
    return (length * (from_a * u + from_b * v)).astype(np.float32)
