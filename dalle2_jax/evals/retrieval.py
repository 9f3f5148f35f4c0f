"""Retrieval: does the judge find in an image what was asked for, among other candidates?

Each image is compared with k captions, of which the first describes it. Embeddings have unit
length, so a dot product is a cosine. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.emoji.words import unit_hash


def candidates(pool: Sequence[str], target: str, num: int, *seed: str) -> list[str]:
    """Returns `target` and then num - 1 other names of `pool`, in random order.

    The choice is a hash of `seed`, `target` and each name, so it depends neither on the order of
    the pool nor on other targets. A smaller pool gives all its names.
    """
    others = sorted(set(pool) - {target}, key=lambda name: unit_hash(*seed, target, name))
    return [target, *others[: num - 1]]


def ranks(z_img: np.ndarray, z_txt: np.ndarray) -> np.ndarray:
    """Returns the rank of each image's target among its candidates: int [n], 0 is the best.

    The rank counts the other candidates that are as near to the image as the target, or nearer: a
    tie counts against the target.

    Args:
        z_img: [n, d].
        z_txt: [n, k, d]; candidate 0 is the target.
    """
    # [n, k] cosines. A network that gives one embedding for everything ties all candidates; counted
    # for the target it would come out as perfect.
    scores = np.einsum("nd,nkd->nk", z_img, z_txt)
    return np.sum(scores[:, 1:] >= scores[:, :1], axis=1)


def clip_score(z_img: np.ndarray, z_txt: np.ndarray) -> float:
    """Returns 100 times the mean cosine of z_img [n, d] and z_txt [n, d].

    This is the score of Hessel et al. (2104.08718) without its factor of 2.5 and its clipping at 0.
    """
    return 100.0 * float(np.mean(np.sum(z_img * z_txt, axis=1, dtype=np.float64)))


def share(hits: np.ndarray) -> tuple[float, float]:
    """Returns the percentage of True in bool [n], and its standard error (binomial)."""
    p = float(np.mean(hits))
    return 100.0 * p, 100.0 * float(np.sqrt(p * (1.0 - p) / len(hits)))
