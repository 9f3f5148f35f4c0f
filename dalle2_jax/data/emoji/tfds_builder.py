"""The TFDS builder of the emoji set, and the rendering of one SVG.

A module of its own: TFDS looks for a builder's package, which a module run with `-m` has not.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image

from dalle2_jax.data.emoji import words
from dalle2_jax.data.emoji.icon_sets import Concept, Picture
from dalle2_jax.data.sources import tfds_folder

SPLITS = ("train", "held_out_pairs", "held_out_concepts")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji in six styles with eight captions each."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="default")]
    RELEASE_NOTES: ClassVar = {"1.0.0": "Noto (two generations), Twemoji, Fluent Emoji (three)."}

    def __init__(self, *, concepts: Sequence[Concept], size: int, subset: str = "", **kwargs: Any):
        self._concepts, self._size, self._subset = concepts, size, subset
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Emoji by concept and style, each with its source and licence.",
            features=features(self._size),
            homepage="https://iconify.design",
            license="Apache-2.0 (noto, noto-v1), CC-BY-4.0 (twemoji), MIT (fluent-emoji*)",
            disable_shuffling=False,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        del dl_manager  # npm fetches; see data/npm.py
        trained: set[bytes] = set()  # TFDS writes one split after the other, `train` first
        there = {split for split, _, _ in records(self._concepts, self._subset)}
        return {s: self._generate_examples(s, trained) for s in SPLITS if s in there}

    def _generate_examples(self, split: str, trained: set[bytes]) -> Iterator[tuple[str, dict]]:
        """The records of `split`; `trained` holds digests of the pictures of `train`.

        A held-out picture equal to one of these is left out: training has seen it, under another
        name. (In black and white the large orange diamond is the large blue one.)
        """
        for its_split, picture, record in records(self._concepts, self._subset):
            if its_split != split:
                continue
            image = render(picture.svg, self._size)
            pixels = hashlib.sha256(image.tobytes()).digest()
            if split == "train":
                trained.add(pixels)
            elif pixels in trained:
                continue
            yield f"{record['concept_id']}/{record['style']}", {"image": image, **record}


def features(size: int) -> tfds.features.FeaturesDict:
    """Of a record, with pictures of `size` px."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=(size, size, 3), dtype=np.uint8, encoding_format="png"
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
        }
    )


def records(
    concepts: Sequence[Concept], subset: str = ""
) -> Iterator[tuple[str, Picture, dict[str, Any]]]:
    """Each picture of `subset` (see `tfds_source.open_split`), with its split and its record, in
    which only `image` lacks."""
    kept = tfds_folder.parse_subset(subset)
    for concept in concepts:
        splits = words.split_of(concept.id, list(concept.pictures))
        for style, picture in concept.pictures.items():
            record = {
                "captions": words.captions(concept.name, style, concept.tags),
                "concept": concept.name,
                "concept_id": concept.id,
                "style": style,
                "group": concept.group,
                "concrete": concept.concrete,
                "tags": list(concept.tags),
                "license": picture.license,
                "source": picture.source,
            }
            if _keeps(kept, record):
                yield splits[style], picture, record


def _keeps(kept: Mapping[str, tuple[str, ...] | None], record: Mapping[str, Any]) -> bool:
    return all(
        record[feature] if values is None else record[feature] in values
        for feature, values in kept.items()
    )


def render(svg: str, size: int) -> np.ndarray:
    """The SVG over white -> uint8 [size, size, 3]."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, drawing).convert("RGB"))
