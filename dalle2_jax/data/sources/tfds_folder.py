"""Prepared TFDS directories: opened by path, filtered, read whole into RAM or as a stream.

Any dataset with an `image` feature and one of CAPTION_FEATURES will do: a text, several, or dicts
that hold such a `text`. Records are read in file order and their pictures stay encoded.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode
from dalle2_jax.storage import paths
from dalle2_jax.validation import sections

CAPTION_FEATURES = ("captions", "caption", "text")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split of a TFDS directory, or several, as in "train+validation"; or an equal part of it.

    `caption_feature` is one of CAPTION_FEATURES.
    """

    path: pathlib.Path
    split: str
    builder: Any
    caption_feature: str
    subset: str
    part: int = 0
    parts: int = 1

    @property
    def num_records(self) -> int:
        """Records in the split before `subset` is applied."""
        return sum(int(s.num_examples) for s in self._splits())

    @property
    def num_bytes(self) -> int:
        return sum(int(s.num_bytes) for s in self._splits())

    def _splits(self) -> list[Any]:
        return [self.builder.info.splits[name] for name in self.split.split("+")]

    def cut(self, parts: int) -> list[Prepared]:
        """Equal parts, but for a record; reading one leaves the files of the others alone."""
        return [dataclasses.replace(self, part=i, parts=parts) for i in range(parts)]

    def part_size(self, part: int) -> int:
        """Records of that part before `subset` is applied."""
        return self.num_records // self.parts + (part < self.num_records % self.parts)

    def dataset(self) -> tf.data.Dataset:
        """Records as dicts in a fixed order, `subset` applied.

        The picture is encoded, and the caption feature, of whatever kind, is bytes [captions].
        """
        dataset = self.builder.as_dataset(
            split=tfds.even_splits(self.split, self.parts)[self.part]
            if self.parts > 1
            else self.split,
            decoders={"image": tfds.decode.SkipDecoding()},
            shuffle_files=False,
            read_config=tfds.ReadConfig(
                interleave_cycle_length=1, skip_prefetch=True, try_autocache=False
            ),
        )
        for feature, values in parse_subset(self.subset).items():
            dataset = dataset.filter(_keeps(feature, values))
        return dataset.map(self._flatten_captions)

    @tf.autograph.experimental.do_not_convert
    def _flatten_captions(self, record: dict[str, Any]) -> dict[str, Any]:
        captions = record[self.caption_feature]
        if isinstance(captions, Mapping):
            captions = captions["text"]
        return {**record, self.caption_feature: tf.reshape(captions, [-1])}


def open_split(path: str | os.PathLike[str], split: str = "train", subset: str = "") -> Prepared:
    """Opens one split of the TFDS directory `path`.

    `subset` keeps the records where each comma-separated term holds: `concrete` (a boolean feature
    is true), `style=noto|twemoji` (a text feature is one of these).

    Raises:
      UserError: no such folder, no TFDS dataset in it, no such split, no picture or caption
        feature, captions that are no text, or `subset` names a feature twice, or one that is not
        there or of another kind.
    """
    path = paths.to_path(path)
    with paths.as_user_error("cannot read", path):
        there, prepared = path.exists(), (path / "dataset_info.json").is_file()
    if not there:
        raise UserError(f"{path}: no such folder; `make data` writes the emoji set to data/emoji")
    if not prepared:
        raise UserError(
            f"{path}: not a TFDS directory (no dataset_info.json); name the folder that holds it, "
            "or use source='folder' for pictures with captions"
        )
    try:
        builder = tfds.builder_from_directory(str(path))
    except Exception as e:  # TFDS raises as it pleases on damaged metadata
        raise UserError(f"{path}: cannot be opened as TFDS ({_line(e)}); prepare it again") from e
    for name in split.split("+"):
        if name not in builder.info.splits:
            raise UserError(f"{path}: no split {name!r}; there are {sorted(builder.info.splits)}")
    features = cast(Mapping[str, Any], builder.info.features)
    caption = next((f for f in CAPTION_FEATURES if f in features), None)
    if "image" not in features or caption is None:
        raise UserError(
            f"{path}: needs a feature `image` and one of {CAPTION_FEATURES}; "
            f"it has {sorted(features)}"
        )
    if not _is_text(features[caption]):
        raise UserError(
            f"{path}: feature {caption!r} is {_line(features[caption])}; prepare it again as Text, "
            "Sequence(Text) or dicts that hold such a `text`"
        )
    check_subset(subset, features, str(path))
    return Prepared(path, split, builder, caption, subset)


def check_subset(subset: str, features: Any, where: str) -> None:
    """UserError where `subset` names a feature twice, or one that is not among `features` or of
    another kind."""
    for feature, values in parse_subset(subset).items():
        if feature not in features:
            hint = sections.near_miss(feature, features)
            raise UserError(f"{where}: subset {subset!r}: no feature {feature!r}{hint}")
        if wrong := _mismatch(feature, values, features[feature]):
            raise UserError(f"{where}: subset {subset!r}: {wrong}")


def parse_subset(subset: str) -> dict[str, tuple[str, ...] | None]:
    """`"concrete,style=noto|twemoji"` -> {"concrete": None, "style": ("noto", "twemoji")}.

    Raises:
      UserError: a feature stands twice.
    """
    terms: dict[str, tuple[str, ...] | None] = {}
    for term in filter(None, (t.strip() for t in (subset or "").split(","))):
        feature, equals, values = (part.strip() for part in term.partition("="))
        if feature in terms:
            raise UserError(
                f"subset {subset!r}: {feature!r} stands twice; to keep several of its values "
                f"write {feature}=A|B"
            )
        terms[feature] = tuple(v.strip() for v in values.split("|")) if equals else None
    return terms


def read_records(source: Prepared) -> list[Mapping[str, Any]]:
    """Every record as numpy (text as bytes), pictures encoded.

    Raises:
      UserError: `subset` keeps nothing, or a shard is damaged.
    """
    try:
        records: list[Any] = list(source.dataset().as_numpy_iterator())
    except tf.errors.OpError as e:
        raise UserError(
            f"{source.path}: split {source.split!r} is damaged ({_line(e)}); prepare it again"
        ) from e
    if not records:
        raise UserError(f"{source.path}: split {source.split!r}, subset {source.subset!r}: empty")
    return records


def sort_records(
    source: Prepared, records: list[Mapping[str, Any]], feature: str
) -> list[Mapping[str, Any]]:
    """`records` by the value of a scalar `feature`; those of one value keep their order.

    Raises:
      UserError: no such feature, or it holds several values a record.
    """
    features = source.builder.info.features
    if feature not in features:
        hint = sections.near_miss(feature, features)
        raise UserError(f"{source.path}: no feature {feature!r}{hint}")
    if features[feature].shape != ():
        raise UserError(f"{source.path}: feature {feature!r} holds several values a record")
    return sorted(records, key=lambda record: record[feature])


def captions_of(record: Mapping[str, Any], feature: str) -> list[str]:
    """The captions of a record of `read_records` as text."""
    return [caption.decode("utf-8", "replace") for caption in record[feature]]


def load_arrays(
    path: str | os.PathLike[str],
    split: str = "train",
    subset: str = "",
    image_size: int | None = None,
    decoded: bool = True,
) -> dict[str, np.ndarray]:
    """A whole split in memory, in file order, for evaluation.

    Returns:
      `image` uint8 [n, h, w, 3] (at the stored size, or `image_size`) or, where it is not
      `decoded`, bytes for `decode_pictures` as object [n], `captions` object [n] of
      lists of text, and every other text or scalar feature as an array [n] (`concept`, ...);
      sequences such as `tags` are object arrays of lists.

    Raises:
      UserError: see `open_split`, or a picture is damaged.
    """
    source = open_split(path, split, subset)
    records = read_records(source)
    images = _objects([record["image"] for record in records])
    if decoded:
        images = decode_pictures(images, f"{path}: split {split!r}", image_size)
    out: dict[str, np.ndarray] = {"image": images}
    out["captions"] = _objects([captions_of(r, source.caption_feature) for r in records])
    for name in records[0]:
        if name not in ("image", source.caption_feature):
            out[name] = _column([r[name] for r in records])
    return out


def decode_pictures(
    encoded: Sequence[bytes] | np.ndarray, where: str, image_size: int | None = None
) -> np.ndarray:
    """uint8 [n, h, w, 3]. UserError: one is damaged, or they differ in size and none is given."""
    images = []
    for i, data in enumerate(encoded):
        try:
            images.append(decode.decode(data, image_size))
        except decode.DamagedImage as e:
            raise UserError(f"{where}, picture {i}: {e}; prepare it again") from e
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{where}: pictures differ in size; pass image_size")
    return np.stack(images)


def _column(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], bytes):
        return np.array([v.decode("utf-8", "replace") for v in values])
    if np.ndim(values[0]) == 0:
        return np.array(values)
    return _objects([[x.decode() if isinstance(x, bytes) else x for x in v] for v in values])


def _objects(values: list[Any]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _is_text(feature: Any) -> bool:
    """Whether a TFDS feature is one text or a row of them, or dicts with such a `text`."""
    shape, dtype = feature.shape, feature.tf_dtype
    if isinstance(shape, Mapping):
        shape, dtype = shape.get("text", ()), dtype.get("text")
    nested = isinstance(feature, tfds.features.Dataset)  # it gives the shape of one element
    return dtype == tf.string and len(shape) <= 1 and not nested


def _mismatch(name: str, values: tuple[str, ...] | None, feature: Any) -> str:
    """What is wrong with asking for these `values` of a TFDS feature; empty if nothing is."""
    scalar = feature.shape == ()
    if scalar and feature.dtype == tf.bool:
        return f"{name!r} is true or false: write {name} alone" if values else ""
    if scalar and feature.dtype == tf.string:
        return "" if values else f"{name!r} is text: write {name}=A or {name}=A|B"
    return f"{name!r} is neither one text nor true or false: choose by another feature"


def _keeps(feature: str, values: tuple[str, ...] | None) -> Any:
    if values is None:
        return lambda record: tf.cast(record[feature], tf.bool)
    return lambda record: tf.reduce_any(tf.equal(tf.constant(values), record[feature]))


def _line(e: object) -> str:
    return " ".join(str(e).split())[:160]
