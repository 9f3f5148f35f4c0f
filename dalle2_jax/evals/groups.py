"""Groups of (concept, style) pairs of the emoji set: seen in training, or held out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.emoji.words import STYLES, caption, unit_hash
from dalle2_jax.errors import UserError

HELD_OUT = "held-out pairs"
# The name of a group in reports -> the split of the data set that it comes from.
SPLITS = {
    "seen pairs": "train",
    HELD_OUT: "held_out_pairs",
    "held-out concepts": "held_out_concepts",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Pairs of one split and their true images.

    Attributes:
        name: a key of SPLITS.
        pairs: n (concept, style).
        images: uint8 [n, h, w, 3], one for each pair.
    """

    name: str
    pairs: Sequence[tuple[str, str]]
    images: np.ndarray

    @property
    def captions(self) -> list[str]:
        """The canonical caption of each pair, from which the model generates."""
        return [caption(concept, style) for concept, style in self.pairs]


def read_groups(
    path: str | os.PathLike[str],
    subset: str,
    num: int,
    seed: int,
    names: Sequence[str] = tuple(SPLITS),
) -> tuple[list[Group], list[str]]:
    """Reads groups of pairs and their images from the emoji data set.

    Pairs are ordered by a hash of the seed and the pair, and the first `num` are taken. A larger
    `num` therefore gives the same pairs and more.

    Args:
        path: the prepared data set (`make data`).
        subset: which records count, as in a config's `data.subset`; "" for all.
        num: pairs per group; a split with fewer gives all of its pairs.
        seed: chooses the pairs.
        names: the groups to return.

    Returns:
        The groups, and the sorted concepts of all splits of the subset.

    Raises:
        UserError: no such data set, an empty split, or one without concepts and styles.
    """
    from dalle2_jax.data.sources import tfds_folder  # late: it loads TensorFlow

    groups, concepts = [], set()
    for name, split in SPLITS.items():
        arrays = tfds_folder.load_arrays(path, split, subset, decoded=False)
        if "concept" not in arrays or "style" not in arrays:
            raise UserError(f"{path}: no features `concept` and `style`: give the emoji set")
        pairs = list(zip(arrays["concept"].tolist(), arrays["style"].tolist(), strict=True))
        if unknown := {style for _, style in pairs} - set(STYLES):
            raise UserError(f"{path}: unknown style {min(unknown)!r}; known: {', '.join(STYLES)}")
        concepts |= {concept for concept, _ in pairs}
        if name not in names:
            continue
        # A pair may occur in several records; its first one gives the image.
        first_record = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
        sample = sorted(first_record, key=lambda pair: unit_hash("evals", str(seed), *pair))[:num]
        encoded = arrays["image"][[first_record[pair] for pair in sample]]
        where = f"{path}: split {split!r}"
        groups.append(Group(name, sample, tfds_folder.decode_images(encoded, where)))
    return groups, sorted(concepts)
