"""What is asked: (concept, style) pairs of the emoji set, seen in training and held out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.emoji.words import STYLES, caption, unit_hash
from dalle2_jax.errors import UserError

HELD_OUT = "held-out pairs"
SPLITS = {
    "seen pairs": "train",
    HELD_OUT: "held_out_pairs",
    "held-out concepts": "held_out_concepts",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """n pairs of one split and their true pictures, uint8 [n, h, w, 3]."""

    name: str
    pairs: Sequence[tuple[str, str]]
    pictures: np.ndarray

    @property
    def captions(self) -> list[str]:
        """The canonical caption of each pair, which is what the model is asked to draw."""
        return [caption(concept, style) for concept, style in self.pairs]


def read_groups(
    path: str | os.PathLike[str],
    subset: str,
    num: int,
    seed: int,
    names: Sequence[str] = tuple(SPLITS),
) -> tuple[list[Group], list[str]]:
    """The groups of these names, each of `num` pairs (or all there are), and every concept of the
    subset.

    The pairs are the first in an order given by a hash of the seed and the pair: a larger `num`
    asks for these and more.

    Raises:
        UserError: no such data set, an empty split, or one without concepts and styles.
    """
    from dalle2_jax.data.sources import tfds_folder  # late: it loads TensorFlow

    groups, pool = [], set()
    for name, split in SPLITS.items():
        arrays = tfds_folder.load_arrays(path, split, subset, decoded=False)
        if "concept" not in arrays or "style" not in arrays:
            raise UserError(f"{path}: no features `concept` and `style`: give the emoji set")
        pairs = list(zip(arrays["concept"].tolist(), arrays["style"].tolist(), strict=True))
        if unknown := {style for _, style in pairs} - set(STYLES):
            raise UserError(f"{path}: unknown style {min(unknown)!r}; known: {', '.join(STYLES)}")
        pool |= {concept for concept, _ in pairs}
        if name not in names:
            continue
        first = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
        drawn = sorted(first, key=lambda pair: unit_hash("evals", str(seed), *pair))[:num]
        encoded = arrays["image"][[first[pair] for pair in drawn]]
        where = f"{path}: split {split!r}"
        groups.append(Group(name, drawn, tfds_folder.decode_images(encoded, where)))
    return groups, sorted(pool)
