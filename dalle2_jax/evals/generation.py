"""Generation of the images that are judged, from captions or from true embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data.emoji.words import unit_hash
from dalle2_jax.pipelines.dalle2 import DALLE2

Progress = Callable[[int], object]
"""Called with the number of images that have just been generated."""


def seeds(seed: int, captions: Sequence[str]) -> list[int]:
    """Returns one seed for each caption, a hash of `seed` and the caption's text."""
    return [int(unit_hash("evals noise", str(seed), caption) * 2**32) for caption in captions]


def generate(
    model: DALLE2,
    captions: Sequence[str],
    seed: int,
    batch_size: int,
    progress: Progress = lambda _: None,
    z_img: np.ndarray | None = None,
) -> np.ndarray:
    """Generates one image of each caption with the whole cascade.

    The noise of an image depends on `seed` and its caption alone, so that an image is the same in
    any batch and beside any other captions. Two calls that differ in `z_img` therefore share their
    noise: if the true images' `z_img` give better scores than the prior's, the difference is the
    prior's loss, and what is still missing is the loss of the decoder and the upsamplers.

    Args:
        z_img: [n, dim], decoded in place of the prior's samples.

    Returns:
        uint8 [n, h, w, 3], in the order of the captions.
    """
    batches = []
    for images in model.stream(
        captions, seed=seeds(seed, captions), z_img=z_img, batch_size=batch_size
    ):
        batches.append(images)
        progress(len(images))
    return np.concatenate(batches)
