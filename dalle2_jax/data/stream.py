"""TFDS splits too large for memory, in a shuffled order that depends on seed and epoch alone.

To resume at a step, the records before it are read again and dropped, still encoded. A split may be
cut into parts, a stream each: a host reads only its own parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from dalle2_jax.data.examples import Damage
from dalle2_jax.data.sources.tfds_folder import BACKGROUNDS, MIRRORABLE, Prepared
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode

_MAX_PLACES = 2**40  # more than a run has
_SEPARATOR = ","  # between names of colours


class Stream:
    """Endless batches of encoded records of `source`, with one caption each, picked by place."""

    def __init__(self, source: Prepared, shuffle: bool, seed: int, buffer: int):
        self._source, self._shuffle, self._seed, self._buffer = source, shuffle, seed, buffer
        self._count = source.part_size(source.part)
        self._first = sum(source.part_size(i) for i in range(source.part))
        # How many records the filter keeps is known only after reading them all, once.
        if source.subset:
            self._count = int(source.dataset().reduce(np.int64(0), lambda n, _: n + 1))
        if not self._count:
            part = f", part {source.part} of {source.parts}" if source.parts > 1 else ""
            raise UserError(
                f"{source.path}: split {source.split!r}, subset {source.subset!r}{part}: empty"
            )

    def __len__(self) -> int:
        """Records in an epoch."""
        return self._count

    def first_image(self) -> bytes:
        """Returns the first image in file order, encoded. Raises UserError if its shard is
        damaged."""
        try:
            record: Any = next(self._source.dataset().take(1).as_numpy_iterator())
            return record["image"]
        except tf.errors.OpError as e:
            message = " ".join(e.message.split())[:200]
            raise UserError(f"{self._source.path}: cannot be read ({message})") from e

    def batches(self, start_step: int, batch_size: int) -> tf.data.Dataset:
        """Returns an endless dataset of this stream's share of each batch, from `start_step` on.

        Args:
          start_step: the first batch.
          batch_size: records of this stream in a batch, b.

        Returns:
          Dicts of `image` (encoded) and `caption`, bytes [b]; `number_if_empty` int64 [b], for
          `require_captions`; `backgrounds` bytes [b], for `split_names`; `mirrorable` bool [b].
        """
        # Each epoch is a dataset of its own, shuffled by a seed of its own. To resume, whole epochs
        # are skipped for nothing, and the records before `start_step` in its epoch are read and
        # dropped: the shuffle buffer must have seen them to give out the same order.
        first_epoch, skipped = divmod(start_step * batch_size, self._count)

        @tf.autograph.experimental.do_not_convert
        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            records = self._source.dataset().enumerate()
            if self._shuffle:
                # Far apart: else seed 0's second epoch would be seed 1's first.
                seed: Any = self._seed + 1_000_003 * number  # a tensor is allowed
                records = records.shuffle(self._buffer, seed, reshuffle_each_iteration=False)
            places = tf.data.Dataset.range(number * self._count, np.iinfo(np.int64).max)
            return tf.data.Dataset.zip(places, records)

        epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
        return epochs.flat_map(epoch).skip(skipped).map(self._pick).batch(batch_size)

    def require_captions(self, number_if_empty: np.ndarray) -> None:
        """Raises UserError if a record of a batch has no caption.

        Args:
          number_if_empty: int64 [b], the places in file order of records without captions, else -1.
        """
        if (number_if_empty >= 0).any():
            raise UserError(
                f"{self._source.path} ({self._source.split}), record {number_if_empty.max()}: "
                "no caption; prepare the data again without such records"
            )

    @tf.autograph.experimental.do_not_convert
    def _pick(self, place: tf.Tensor, numbered: tuple[tf.Tensor, dict]) -> dict[str, tf.Tensor]:
        number, record = numbered
        # Runs inside tf.data, before images are decoded: only what this record needs goes on.
        captions = record[self._source.caption_feature]
        count = tf.size(captions)
        # Another part must not pick alike at the same place.
        unique_place = place + self._source.part * _MAX_PLACES
        seed = tf.stack([tf.cast(self._seed, tf.int64), unique_place])
        which = tf.random.stateless_uniform([], seed, 0, tf.maximum(count, 1), tf.int32)
        return {
            "image": record["image"],
            "caption": tf.concat([captions, [""]], 0)[which],
            "number_if_empty": tf.where(count > 0, tf.constant(-1, tf.int64), self._first + number),
            # Rows of a batch need one shape, so the names of colours travel as one text.
            "backgrounds": tf.strings.reduce_join(
                record.get(BACKGROUNDS, tf.constant([], tf.string)), separator=_SEPARATOR
            ),
            "mirrorable": record.get(MIRRORABLE, tf.constant(True)),
        }


def split_names(backgrounds: bytes) -> list[str]:
    """Splits the names of colours as a stream joins them."""
    return backgrounds.decode().split(_SEPARATOR) if backgrounds else []


class Window:
    """A stream's images in one batch; a damaged one gives way to the next that is not.

    Args:
      encoded: bytes [b].
      size: side of what `get` returns.
      damage: collects the damaged ones.
      keep_alpha: whether images are RGBA rather than RGB over white.
    """

    def __init__(self, encoded: np.ndarray, size: int, damage: Damage, keep_alpha: bool = False):
        self._encoded, self._size, self._damage = encoded, size, damage
        self._keep_alpha = keep_alpha

    def get(self, place: int, crop: tuple[float, float, float]) -> tuple[np.ndarray, int]:
        """Returns uint8 [size, size, 3 or 4] for `place` in the batch, and the place it is from.

        Raises:
          UserError: every image of the batch is damaged.
        """
        # Within the batch only: a stream cannot look at other records.
        for offset in range(len(self._encoded)):
            used = (place + offset) % len(self._encoded)
            data = self._encoded[used]
            try:
                return decode.decode(data, self._size, crop, self._keep_alpha), used
            except decode.DamagedImage as e:
                self._damage.add(f"image of {len(data)} bytes, {data[:8].hex()}...", e)
        raise UserError(f"all {len(self._encoded)} images of a batch are damaged")
