"""The pictures that are judged, drawn by a DALLE2: from captions, or from true embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data.emoji.words import unit_hash
from dalle2_jax.pipelines.dalle2 import DALLE2

Progress = Callable[[int], None]
"""Called with the number of pictures that were just drawn."""


def seeds(seed: int, captions: Sequence[str]) -> list[int]:
    """A seed of each caption's own."""
    return [int(unit_hash("evals noise", str(seed), caption) * 2**32) for caption in captions]


def generate(
    model: DALLE2,
    captions: Sequence[str],
    seed: int,
    batch_size: int,
    progress: Progress = lambda _: None,
    z_img: np.ndarray | None = None,
) -> np.ndarray:
    """One picture of each caption by the whole cascade -> uint8 [n, h, w, 3].

    Each has noise of its own, named by `seed` and its caption: it depends neither on the batch nor
    on the other captions. With the true pictures' `z_img` [n, dim] in place of the prior's, and all
    noise the same, what is found more than without is lost by the prior, the rest by the decoder
    and the upsamplers.
    """
    told = {"seed": seeds(seed, captions), "z_img": z_img, "batch_size": batch_size}
    drawn = []
    for pictures in model.stream(captions, **told):
        drawn.append(pictures)
        progress(len(pictures))
    return np.concatenate(drawn)
