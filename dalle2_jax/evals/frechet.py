"""Distances between two sets of features [n, d]: the Frechet distance and the kernel distance.

They are FID and KID for features of any network (here a judge CLIP, not Inception). The Frechet
distance compares two Gaussians fitted to the sets; the kernel distance compares the sets by a
polynomial kernel and, unlike the first, is unbiased for small sets.

With mean m and covariance S of each set, and k(x, y) = (x . y / d + 1)^3:
(1) FD  = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)              1706.08500, eq. 6
(2) KID = mean over i != j of k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i)
                                                                              1801.01401, eq. 4
"""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes equation (1) in float64.

    A small set biases it upwards, so compare only distances between sets of the same size.

    Args:
        a: features [n, d].
        b: features [m, d].

    Returns:
        The distance, 0 or more, in squared units of the features.

    Raises:
        ValueError: fewer than two rows, or sets of different widths.
    """
    a, b = _checked(a, b)
    mean = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    cov_a, cov_b = _covariance(a), _covariance(b)
    # tr (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2). This avoids the
    # root of a matrix that is not symmetric, which rounding can turn complex.
    root = np.linalg.svd(_symmetric_root(cov_a) @ _symmetric_root(cov_b), compute_uv=False).sum()
    return max(0.0, float(mean + np.trace(cov_a) + np.trace(cov_b) - 2.0 * root))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes equation (2) in float64, an unbiased estimate that may fall below 0.

    The sum leaves out the pairs (a_i, b_i). Row i of the two sets may therefore depend on each
    other, as a generated and a true image of one caption do.

    Args:
        a: features [n, d].
        b: features [n, d].

    Raises:
        ValueError: fewer than two rows, or sets of different shapes.
    """
    a, b = _checked(a, b)
    if len(a) != len(b):
        raise ValueError(
            f"kernel_distance: {len(a)} and {len(b)} rows; both sets need the same number"
        )
    # One matrix of all four terms: its entry (i, j) is the summand of (2), its diagonal i = j is
    # left out. a_i with b_i is left out with it, hence sets of one size.
    total = _kernel(a, a) + _kernel(b, b) - _kernel(a, b) - _kernel(b, a)
    return float((total.sum() - np.trace(total)) / (len(a) * (len(a) - 1)))


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [n, d] with n of 2 or more: {a.shape}, {b.shape}")
    return a, b


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(x, rowvar=False))


def _symmetric_root(cov: np.ndarray) -> np.ndarray:
    # Rounding may turn an eigenvalue of 0 slightly negative.
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0.0))[None]) @ vectors.T


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
