"""Retrieval: does a judge find what was asked for, among other things that could have been?

Embeddings are unit length, so a dot product is a cosine. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.emoji.words import unit_hash


def candidates(pool: Sequence[str], asked: str, num: int, *seed: str) -> list[str]:
    """`asked`, then num - 1 others of `pool` (fewer where it is smaller), in an order of chance.

    The draw is a hash of `seed`, `asked` and each name: it depends neither on the order of the
    pool nor on what else is asked.
    """
    others = sorted(set(pool) - {asked}, key=lambda name: unit_hash(*seed, asked, name))
    return [asked, *others[: num - 1]]


def ranks(z_img: np.ndarray, z_txt: np.ndarray) -> np.ndarray:
    """int [n]: how many of the other candidates a picture is as near to as to the asked, or nearer.

    z_img [n, d]; z_txt [n, k, d], candidate 0 the asked one. 0 is "found first"; a tie is none.
    """
    scores = np.einsum("nd,nkd->nk", z_img, z_txt)
    return np.sum(scores[:, 1:] >= scores[:, :1], axis=1)


def clip_score(z_img: np.ndarray, z_txt: np.ndarray) -> float:
    """100 times the mean cosine of z_img [n, d] and z_txt [n, d] (Hessel et al. 2021, unscaled)."""
    return 100.0 * float(np.mean(np.sum(z_img * z_txt, axis=1, dtype=np.float64)))


def share(hits: np.ndarray) -> tuple[float, float]:
    """Per cent of True in bool [n], and its standard error (binomial)."""
    p = float(np.mean(hits))
    return 100.0 * p, 100.0 * float(np.sqrt(p * (1.0 - p) / len(hits)))
