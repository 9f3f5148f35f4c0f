"""The pictures that are judged, drawn by a DALLE2: from captions, or from true embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.dalle2 import DALLE2

Progress = Callable[[int], None]
"""Called with the number of pictures that were just drawn."""


def generate(
    model: DALLE2,
    captions: Sequence[str],
    seed: int,
    batch_size: int,
    progress: Progress,
    z_img: np.ndarray | None = None,
) -> np.ndarray:
    """One picture of each caption by the whole cascade -> uint8 [n, h, w, 3].

    Batch i is drawn with seed + i: the pictures of one call of DALLE2.generate share their noise.
    With the true pictures' `z_img` [n, dim] in place of the prior's, and all noise the same, what
    is found more than without is lost by the prior, the rest by the decoder and the upsamplers.
    """
    drawn, size = [], min(batch_size, len(captions))
    for start in range(0, len(captions), size):
        # All batches are of one size, so that one program serves them.
        places = np.minimum(np.arange(start, start + size), len(captions) - 1)
        pictures = model.generate(
            [captions[int(i)] for i in places],
            seed=(seed + start // size) % 2**32,
            z_img=None if z_img is None else z_img[places],
            batch_size=size,
        )
        drawn.append(pictures[: len(captions) - start])
        progress(len(drawn[-1]))
    return np.concatenate(drawn)
