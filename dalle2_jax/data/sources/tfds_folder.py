"""Prepared TFDS directories: opened by path, filtered, read into memory or as a stream.

Any data set with an `image` feature and one of CAPTION_FEATURES will do: a text, several, or dicts
that hold such a `text`. Records are read in file order and their images stay encoded. The features
BACKGROUNDS and MIRRORABLE, which the emoji set has, say what attributes a record may get while
training (see `dalle2_jax.data.attributes`).
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

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.imaging import decode
from dalle2_jax.storage import paths

CAPTION_FEATURES = ("captions", "caption", "text")
BACKGROUNDS, MIRRORABLE = "backgrounds", "mirrorable"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split of a TFDS directory, opened but not read.

    Attributes:
      path: the directory.
      split: its name; several are joined as in "train+validation".
      builder: of TFDS.
      caption_feature: the one of CAPTION_FEATURES that the data set has.
      subset: the records to keep, see `open_split`.
      part: which of `parts` equal parts this is.
      parts: into how many parts the split is cut.
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
        """Records in the split, before `subset` is applied."""
        return sum(int(s.num_examples) for s in self._splits())

    @property
    def num_bytes(self) -> int:
        """Bytes of the encoded records of the split, before `subset` is applied."""
        return sum(int(s.num_bytes) for s in self._splits())

    def _splits(self) -> list[Any]:
        return [self.builder.info.splits[name] for name in self.split.split("+")]

    def cut(self, parts: int) -> list[Prepared]:
        """Cuts the split into parts whose sizes differ by one record at most.

        Reading a part does not open files that only other parts need.
        """
        return [dataclasses.replace(self, part=i, parts=parts) for i in range(parts)]

    def part_size(self, part: int) -> int:
        """Returns the number of records in a part, before `subset` is applied."""
        return self.num_records // self.parts + (part < self.num_records % self.parts)

    def dataset(self) -> tf.data.Dataset:
        """Returns the records as dicts in file order, `subset` applied.

        The image is encoded, and the caption feature, of whatever kind, is bytes [captions].
        """
        dataset = self.builder.as_dataset(
            split=tfds.even_splits(self.split, self.parts)[self.part]
            if self.parts > 1
            else self.split,
            # Encoded images are a tenth as large; the pipeline decodes those that it needs.
            decoders={"image": tfds.decode.SkipDecoding()},
            # Shards one after the other, and no parallel reads, keep the order of the files.
            shuffle_files=False,
            read_config=tfds.ReadConfig(
                interleave_cycle_length=1, skip_prefetch=True, try_autocache=False
            ),
        )
        # Filtered while reading: a large data set needs no copy for a subset.
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
    """Opens one split of a TFDS directory.

    Args:
      path: the directory, local or gs://.
      split: its name, or several joined by "+".
      subset: keeps the records where each comma-separated term holds: `concrete` (a boolean feature
        is true), `style=noto|twemoji` (a text feature is one of these).

    Raises:
      UserError: no such folder, no TFDS data set in it, no such split, no image or caption
        feature, captions that are no text, or `subset` names a feature twice, or one that is
        missing or of another kind.
    """
    path = paths.to_path(path)
    with paths.as_user_error("cannot read", path):
        exists, is_prepared = path.exists(), (path / "dataset_info.json").is_file()
    if not exists:
        raise UserError(f"{path}: no such folder; `make data` writes the emoji set to data/emoji")
    if not is_prepared:
        raise UserError(
            f"{path}: not a TFDS directory (no dataset_info.json); name the folder that holds it, "
            "or use source='folder' for images with captions"
        )
    try:
        builder = tfds.builder_from_directory(str(path))
    except Exception as e:  # on damaged metadata TFDS raises errors of many kinds
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
    """Checks that every term of a subset suits the features of a data set.

    Args:
      subset: see `open_split`.
      features: of TFDS.
      where: opens the message.

    Raises:
      UserError: a feature stands twice, is missing, or is of another kind.
    """
    for feature, values in parse_subset(subset).items():
        if feature not in features:
            hint = near_miss(feature, features)
            raise UserError(f"{where}: subset {subset!r}: no feature {feature!r}{hint}")
        if message := _mismatch(feature, values, features[feature]):
            raise UserError(f"{where}: subset {subset!r}: {message}")


def parse_subset(subset: str) -> dict[str, tuple[str, ...] | None]:
    """Parses `"concrete,style=noto|twemoji"` to {"concrete": None, "style": ("noto", "twemoji")}.

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
    """Reads every record as numpy arrays; text is bytes, and images stay encoded.

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
    """Sorts records by the value of a scalar feature; those of one value keep their order.

    Raises:
      UserError: no such feature, or it holds several values a record.
    """
    features = source.builder.info.features
    if feature not in features:
        hint = near_miss(feature, features)
        raise UserError(f"{source.path}: no feature {feature!r}{hint}")
    if features[feature].shape != ():
        raise UserError(f"{source.path}: feature {feature!r} holds several values a record")
    return sorted(records, key=lambda record: record[feature])


def captions_of(record: Mapping[str, Any], feature: str) -> list[str]:
    """Returns the captions of a record of `read_records` as text."""
    return [caption.decode("utf-8", "replace") for caption in record[feature]]


def check_attributes(source: Prepared, background_share: float, mirror_share: float) -> None:
    """Raises UserError if a config asks for attributes that the data set says nothing about."""
    features = source.builder.info.features
    required = (
        ("background_share", background_share, BACKGROUNDS),
        ("mirror_share", mirror_share, MIRRORABLE),
    )
    for key, share, feature in required:
        if share and feature not in features:
            raise UserError(
                f"{source.path}: no feature {feature!r}, which config.data.{key}={share} needs: "
                f"prepare the emoji set again (`make data`), or set --config.data.{key}=0"
            )


def attributes_of(
    records: Sequence[Mapping[str, Any]],
) -> tuple[list[list[str]], list[bool]]:
    """Returns backgrounds and mirrorable of each record; empty lists where they have neither."""
    backgrounds = [
        [name.decode() for name in record[BACKGROUNDS]]
        for record in records
        if BACKGROUNDS in record
    ]
    mirrorable = [bool(record[MIRRORABLE]) for record in records if MIRRORABLE in record]
    return backgrounds, mirrorable


def load_arrays(
    path: str | os.PathLike[str],
    split: str = "train",
    subset: str = "",
    image_size: int | None = None,
    decoded: bool = True,
) -> dict[str, np.ndarray]:
    """Reads a whole split into memory, in file order, for evaluation.

    Args:
      path: the TFDS directory.
      split: its name, or several joined by "+".
      subset: the records to keep, see `open_split`.
      image_size: side of the images; None keeps the stored size.
      decoded: False returns the images encoded, for `decode_images`.

    Returns:
      `image` uint8 [n, h, w, 3], or object [n] of bytes; `captions` object [n] of lists of text;
      and every other text or scalar feature as an array [n] (`concept`, ...). Sequences such as
      `tags` are object arrays of lists. Images with an alpha are over white.

    Raises:
      UserError: see `open_split`, or an image is damaged.
    """
    source = open_split(path, split, subset)
    records = read_records(source)
    images = _objects([record["image"] for record in records])
    if decoded:
        images = decode_images(images, f"{path}: split {split!r}", image_size)
    arrays: dict[str, np.ndarray] = {"image": images}
    arrays["captions"] = _objects([captions_of(r, source.caption_feature) for r in records])
    for name in records[0]:
        if name not in ("image", source.caption_feature):
            arrays[name] = _column([r[name] for r in records])
    return arrays


def decode_images(
    encoded: Sequence[bytes] | np.ndarray, where: str, image_size: int | None = None
) -> np.ndarray:
    """Decodes images over white.

    Args:
      encoded: n images.
      where: opens the message of an error.
      image_size: side of the result; None keeps their own size, which must be the same for all.

    Returns:
      uint8 [n, h, w, 3].

    Raises:
      UserError: an image is damaged, or their sizes differ and `image_size` is None.
    """
    images = []
    for i, data in enumerate(encoded):
        try:
            images.append(decode.decode(data, image_size))
        except decode.DamagedImage as e:
            raise UserError(f"{where}, image {i}: {e}; prepare it again") from e
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{where}: images differ in size; pass image_size")
    return np.stack(images)


def _column(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], bytes):
        return np.array([v.decode("utf-8", "replace") for v in values])
    if np.ndim(values[0]) == 0:
        return np.array(values)
    return _objects([[x.decode() if isinstance(x, bytes) else x for x in v] for v in values])


def _objects(values: list[Any]) -> np.ndarray:
    """An array [n] of Python objects, also where numpy would make more dimensions of them."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _is_text(feature: Any) -> bool:
    """Whether a TFDS feature is one text or a row of them, or dicts with such a `text`."""
    # A FeaturesDict has dicts for shape and dtype; captions of COCO are such dicts.
    shape, dtype = feature.shape, feature.tf_dtype
    if isinstance(shape, Mapping):
        shape, dtype = shape.get("text", ()), dtype.get("text")
    is_nested = isinstance(feature, tfds.features.Dataset)  # its shape is that of one element
    return dtype == tf.string and len(shape) <= 1 and not is_nested


def _mismatch(name: str, values: tuple[str, ...] | None, feature: Any) -> str:
    """Why a subset cannot ask for these `values` of a TFDS feature; empty if it can."""
    is_scalar = feature.shape == ()
    if is_scalar and feature.dtype == tf.bool:
        return f"{name!r} is true or false: write {name} alone" if values else ""
    if is_scalar and feature.dtype == tf.string:
        return "" if values else f"{name!r} is text: write {name}=A or {name}=A|B"
    return f"{name!r} is neither one text nor true or false: choose by another feature"


def _keeps(feature: str, values: tuple[str, ...] | None) -> Any:
    if values is None:
        return lambda record: tf.cast(record[feature], tf.bool)
    return lambda record: tf.reduce_any(tf.equal(tf.constant(values), record[feature]))


def _line(e: object) -> str:
    return " ".join(str(e).split())[:160]
