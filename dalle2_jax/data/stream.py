"""TFDS splits too large for memory, in a shuffled order that depends on seed and epoch alone.

To go on at a step, the records before it are read again and dropped, still encoded. A split may be
cut into parts, a stream each: a host reads its own alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from dalle2_jax.data.examples import Damage
from dalle2_jax.data.sources.tfds_folder import Prepared
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode

_PLACES = 2**40  # more than a run has


class Stream:
    """Endless batches of encoded records of `source`; one caption a record, drawn by place."""

    def __init__(self, source: Prepared, shuffle: bool, seed: int, buffer: int):
        self._source, self._shuffle, self._seed, self._buffer = source, shuffle, seed, buffer
        self._count = source.part_size(source.part)
        self._first = sum(source.part_size(i) for i in range(source.part))
        if source.subset:  # how many the filter keeps is known after reading them
            self._count = int(source.dataset().reduce(np.int64(0), lambda n, _: n + 1))
        if not self._count:
            part = f", part {source.part} of {source.parts}" if source.parts > 1 else ""
            raise UserError(
                f"{source.path}: split {source.split!r}, subset {source.subset!r}{part}: empty"
            )

    def __len__(self) -> int:
        """Records in an epoch."""
        return self._count

    def first_picture(self) -> bytes:
        """Encoded, in file order. Raises UserError where its shard is damaged."""
        try:
            record: Any = next(self._source.dataset().take(1).as_numpy_iterator())
            return record["image"]
        except tf.errors.OpError as e:
            said = " ".join(e.message.split())[:200]
            raise UserError(f"{self._source.path}: cannot be read ({said})") from e

    def batches(self, start_step: int, batch_size: int) -> tf.data.Dataset:
        """{"image": bytes [b], "caption": bytes [b], "bare": int64 [b]} from `start_step` on.

        b is this stream's part of the global batch; `bare` is for `require_captions`.
        """
        first_epoch, skipped = divmod(start_step * batch_size, self._count)

        @tf.autograph.experimental.do_not_convert
        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            records = self._source.dataset().enumerate()
            if self._shuffle:
                seed: Any = self._seed + 1_000_003 * number  # a tensor will do
                records = records.shuffle(self._buffer, seed, reshuffle_each_iteration=False)
            places = tf.data.Dataset.range(number * self._count, np.iinfo(np.int64).max)
            return tf.data.Dataset.zip(places, records)

        epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
        return epochs.flat_map(epoch).skip(skipped).map(self._pick).batch(batch_size)

    def require_captions(self, bare: np.ndarray) -> None:
        """`bare` [b]: the places in file order of a batch's records that lack captions, else -1.

        Raises:
          UserError: a record has no caption.
        """
        if (bare >= 0).any():
            raise UserError(
                f"{self._source.path} ({self._source.split}), record {bare.max()}: no caption; "
                "prepare the data again without such records"
            )

    @tf.autograph.experimental.do_not_convert
    def _pick(self, place: tf.Tensor, numbered: tuple[tf.Tensor, dict]) -> dict[str, tf.Tensor]:
        number, record = numbered
        captions = record[self._source.caption_feature]
        count = tf.size(captions)
        draw = place + self._source.part * _PLACES  # other parts draw otherwise
        seed = tf.stack([tf.cast(self._seed, tf.int64), draw])
        which = tf.random.stateless_uniform([], seed, 0, tf.maximum(count, 1), tf.int32)
        return {
            "image": record["image"],
            "caption": tf.concat([captions, [""]], 0)[which],
            "bare": tf.where(count > 0, tf.constant(-1, tf.int64), self._first + number),
        }


class Window:
    """A stream's pictures in one batch; a damaged one gives way to the next that is whole."""

    def __init__(self, encoded: np.ndarray, size: int, damage: Damage):
        self._encoded, self._size, self._damage = encoded, size, damage

    def get(self, place: int, crop: tuple[float, float, float]) -> tuple[np.ndarray, int]:
        """uint8 [size, size, 3] for `place` in the batch, and the place it was found at.

        Raises:
          UserError: no picture of the batch is whole.
        """
        for offset in range(len(self._encoded)):
            used = (place + offset) % len(self._encoded)
            data = self._encoded[used]
            try:
                return decode.decode(data, self._size, crop), used
            except decode.DamagedImage as e:
                self._damage.add(f"picture of {len(data)} bytes, {data[:8].hex()}...", e)
        raise UserError(f"all {len(self._encoded)} pictures of a batch are damaged")
