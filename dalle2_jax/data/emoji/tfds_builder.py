"""The TFDS builder of the emoji set.

A record is one drawing: concept x style. Its image keeps the alpha, so that the training pipeline
puts it on any of its `backgrounds` (see `dalle2_jax.data.attributes`); a reader that knows nothing
of this sees it on white. Only records of `held_out_triples` are composed already: one opaque image
for each background that training leaves out.

A module of its own: TFDS looks for a builder's package, which a module run with `-m` has not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from dalle2_jax.data import attributes
from dalle2_jax.data.emoji import render
from dalle2_jax.data.emoji.records import Record
from dalle2_jax.data.emoji.splits import SPLITS

_LICENSES = (
    "Apache-2.0 (noto, noto-v1, fxemoji), CC-BY-4.0 (twemoji, emojione, emojione-monotone, "
    "streamline-emojis), MIT (fluent-emoji*), CC-BY-SA-4.0 (openmoji, emojione-v1)"
)


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji in ten styles, and two more to evaluate on, with captions and attributes."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="default")]
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "Noto (two generations), Twemoji, Fluent Emoji (three).",
        "2.0.0": "Six more sets, alpha, backgrounds, mirroring, splits validation and triples.",
    }

    def __init__(self, *, records: Sequence[Record], size: int, **kwargs: Any):
        self._records, self._size = records, size
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Emoji by concept and style, each with its source and licence.",
            features=features(self._size),
            homepage="https://iconify.design",
            license=_LICENSES,
            disable_shuffling=False,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # npm fetches; see data/emoji/npm.py
        present = {record.split for record in self._records}  # TFDS writes no empty split
        return {split: self._generate_examples(split) for split in SPLITS if split in present}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        for record in self._records:
            if record.split != split:
                continue
            # Rendered again, at the size asked for: the small rendering only served to make the
            # records.
            image = render.render(record.drawing.svg, self._size)
            background = record.features["background"]
            if background != attributes.WHITE:
                painted = attributes.paint(image, background)
                image = np.dstack([painted, np.full(image.shape[:2], 255, np.uint8)])
            yield record.key, {"image": image, **record.features}


def features(size: int) -> tfds.features.FeaturesDict:
    """Returns the features of a record with images of `size` px."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=(size, size, 4), dtype=np.uint8, encoding_format="png"
            ),
            "captions": tfds.features.Sequence(text()),
            "concept": text(),
            "concept_id": text(),
            "style": text(),
            "group": text(),
            "concrete": tfds.features.Scalar(dtype=np.bool_),
            "tags": tfds.features.Sequence(text()),
            "license": text(),
            "source": text(),
            "background": text(),
            "backgrounds": tfds.features.Sequence(text()),
            "mirrorable": tfds.features.Scalar(dtype=np.bool_),
        }
    )
