"""Batches {"image": uint8 [b, h, w, 3], "tokens": int32 [b, context]} by step, for every source.

The example at place g = step * batch_size + i of a run is a pure function of (seed, g), its caption
and crop of (seed, step, i): a run goes on at any step without a saved iterator, and the batches of
several hosts together are those of one host.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from dalle2_jax.data import stream
from dalle2_jax.data.config import DataConfig
from dalle2_jax.data.examples import CENTRE, Damage, Examples, PictureCache, TokenTable
from dalle2_jax.data.sources import image_folder, tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.validation import sections

_PREFETCH = 3
_GROUP_SIZE = 2
_LEAST_BUFFER = 16  # records


class Batches:
    """start step -> an endless iterator of this host's share of each batch, from that step on.

    Attributes:
      num_examples: in an epoch.
      damaged: picture -> why it was replaced by another.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        batch_size: int,
        rows: np.ndarray,
    ):
        self._config, self._batch_size, self._rows = config, batch_size, rows
        self._tokenizer = Tokenizer(config.context_length, config.vocab_size)
        self._random_crops = tuple(config.crop_scale) != (1.0, 1.0)
        self._damage = Damage()
        self._maker = concurrent.futures.ThreadPoolExecutor(1)
        self._decoders = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        source = _open(config, split)
        self._streams: list[stream.Stream] = []  # those that this host reads, by `_parts`
        if isinstance(source, list):
            if batch_size % len(source):
                raise UserError(
                    f"batch_size={batch_size} is not a multiple of "
                    f"config.data.stream_parts={len(source)}"
                )
            self._part_size = batch_size // len(source)
            self._parts = sorted(set((rows // self._part_size).tolist()))
            if len(self._parts) * self._part_size != len(rows):
                enough = _whole_parts(rows, batch_size)
                raise UserError(
                    f"config.data.stream_parts={len(source)}: this host's devices hold {len(rows)} "
                    f"of {batch_size} rows, which are no whole parts, so that several hosts would "
                    f"read the same; set --config.data.stream_parts={enough}"
                )
            self._streams = [source[part] for part in self._parts]
            self.num_examples = sum(len(part) for part in source)
        else:
            self.num_examples = len(source)
        self._group_size = _GROUP_SIZE if config.group_by else 1
        if self._group_size > self.num_examples:
            raise UserError(
                f"config.data.group_by={config.group_by!r}, but {config.path} ({split}) holds only "
                f"{self.num_examples} record"
            )
        name = f"{config.path} ({split})"
        if batch_size > self.num_examples:
            logging.warning(
                "%s: batch_size=%d but only %d pictures: each batch repeats some",
                name,
                batch_size,
                self.num_examples,
            )
        if isinstance(source, list):
            _warn_if_small(self._streams[0].first_picture(), name, config.image_size)
            return
        _warn_if_small(source.first_picture(), name, config.image_size)
        source.damage = self._damage
        self._tokens = TokenTable(source, self._tokenizer)
        self._cache = PictureCache(
            source, config.image_size, self._random_crops, int(config.decoded_gb * 2**30)
        )

    @property
    def damaged(self) -> Mapping[str, str]:
        return self._damage.found

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Numpy batches from `start_step` on, made ahead in a thread.

        Raises:
          UserError: while reading: a file is gone, a shard is damaged, too many damaged pictures,
            a streamed record without a caption.
        """
        plans = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max).map(self._plan)
        if self._streams:
            records = [part.batches(start_step, self._part_size) for part in self._streams]
            plans = tf.data.Dataset.zip(plans, *records).map(_join)
        settings = tf.data.Options()
        settings.deterministic = True
        settings.threading.private_threadpool_size = 2
        make: Callable[..., dict[str, np.ndarray]]
        make = self._decode_records if self._streams else self._gather
        # Python's part is kept out of tf.data: a tf.numpy_function that runs while the interpreter
        # exits hangs it, and its errors come back as text.
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        tf_error = tf.errors.OpError  # by a name that outlives the module at exit
        try:
            numpy_plans: Any = plans.prefetch(_PREFETCH).with_options(settings).as_numpy_iterator()
            for plan in numpy_plans:
                ahead.append(self._maker.submit(make, **plan))
                if len(ahead) > _PREFETCH:
                    yield ahead.popleft().result()
        except tf_error as e:
            said = " ".join(e.message.split())[:200]
            raise UserError(f"{self._config.path}: cannot be read on ({said})") from e
        finally:
            for future in ahead:
                future.cancel()

    @tf.autograph.experimental.do_not_convert
    def _plan(self, step: tf.Tensor) -> dict[str, tf.Tensor]:
        """What this host draws at `step`: example, caption, mirror and crop for each place."""
        config, n, size = self._config, self.num_examples, self._group_size
        place = step * self._batch_size + tf.range(self._batch_size, dtype=tf.int64)
        epoch, index = place // (n - n % size), place % (n - n % size)
        if config.shuffle and not self._streams:
            within = index % size
            index = self._shuffled(index // size, epoch, 0, n // size) * size + within
            if size > 1:  # where the groups begin moves, so that none is always cut in two
                index = (index + self._shuffled(tf.zeros_like(index), epoch, 1, n)) % n
        draws = tf.random.stateless_uniform(
            [self._batch_size, 5], tf.stack([tf.cast(config.shuffle_seed, tf.int64), step])
        )
        return {"index": tf.gather(index, self._rows), "draws": tf.gather(draws, self._rows)}

    def _shuffled(self, index: tf.Tensor, epoch: tf.Tensor, salt: int, n: int) -> tf.Tensor:
        """Where a permutation of 0 ... n - 1, named by `epoch` [b] and `salt`, puts `index` [b]."""
        ones = tf.ones_like(epoch)
        # the op itself: tf.random.experimental.index_shuffle takes one seed for all only
        return tf.raw_ops.RandomIndexShuffle(
            index=index,
            seed=tf.stack([self._config.shuffle_seed * ones, epoch, salt * ones], 1),
            max_index=(n - 1) * ones,
        )

    def _gather(self, index: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        places = index.tolist()
        run = map if self._cache.holds(places) else self._decoders.map  # idle threads cost as well
        images, used = zip(*run(self._cache.get, places, self._crops(draws)), strict=True)
        return {
            "image": self._finish(images, draws),
            "tokens": self._tokens.get(np.array(used), draws[:, 0]),
        }

    def _decode_records(
        self,
        index: np.ndarray,
        draws: np.ndarray,
        image: np.ndarray,
        caption: np.ndarray,
        bare: np.ndarray,
    ) -> dict[str, np.ndarray]:
        del index  # the stream's own order
        size = self._part_size
        self._streams[0].require_captions(bare)
        windows = {
            part: stream.Window(
                image[i * size : (i + 1) * size], self._config.image_size, self._damage
            )
            for i, part in enumerate(self._parts)
        }
        first = {part: i * size for i, part in enumerate(self._parts)}

        def get(row: int, crop: tuple[float, float, float]) -> tuple[np.ndarray, int]:
            part, place = divmod(row, size)
            picture, used = windows[part].get(place, crop)
            return picture, first[part] + used

        found = self._decoders.map(get, self._rows.tolist(), self._crops(draws))
        images, used = zip(*found, strict=True)
        texts = [c.decode("utf-8", "replace") for c in caption[list(used)]]
        return {"image": self._finish(images, draws), "tokens": self._tokenizer(texts)}

    def _crops(self, draws: np.ndarray) -> list[tuple[float, float, float]]:
        if not self._random_crops:
            return [CENTRE] * len(draws)
        low, high = self._config.crop_scale
        return [(low + (high - low) * float(s), float(y), float(x)) for s, y, x in draws[:, 1:4]]

    def _finish(self, images: Sequence[np.ndarray], draws: np.ndarray) -> np.ndarray:
        batch = np.stack(images)
        if self._config.flip:
            mirrored = draws[:, 4] < 0.5
            batch[mirrored] = batch[mirrored, :, ::-1]
        return batch


def make_dataset(
    config: Mapping[str, Any],
    *,
    batch_size: int,
    split: str | None = None,
    rows: np.ndarray | None = None,
) -> Batches:
    """The section `data` of a config -> `Batches`: call it with the step to start from.

    `batch_size` is that of all hosts together, of which this one reads `rows` (int [n]; all where
    it is None); `split` defaults to the config's.

    Raises:
      UserError: an unknown key or source, a value of the wrong kind or out of range, a missing or
        empty path, see the sources.
    """
    data = sections.construct(DataConfig, config, "config.data")
    return Batches(
        data, split or data.split, batch_size, np.arange(batch_size) if rows is None else rows
    )


def _warn_if_small(picture: bytes, name: str, image_size: int) -> None:
    """One look at the first picture: a data set prepared too small blurs all it teaches."""
    try:
        side = min(decode.decode(picture).shape[:2])
    except decode.DamagedImage:
        return  # told when a batch meets it
    if side < image_size:
        logging.warning(
            "%s: pictures of %d px, enlarged to image_size=%d: prepare larger ones",
            name,
            side,
            image_size,
        )


def _join(plan: dict[str, Any], *records: dict[str, Any]) -> dict[str, Any]:
    """A host's plan and what its parts gave, row after row."""
    return plan | {k: tf.concat([record[k] for record in records], 0) for k in records[0]}


def _whole_parts(rows: np.ndarray, batch_size: int) -> int:
    """The fewest equal parts of a batch of which `rows` (sorted) fill some whole."""
    breaks = np.flatnonzero(np.diff(rows) > 1)
    edges = [rows[0], rows[-1] + 1, *(rows[breaks] + 1), *rows[breaks + 1]]
    return batch_size // math.gcd(batch_size, *map(int, edges))


def _open(config: DataConfig, split: str) -> Examples | list[stream.Stream]:
    if config.source == "folder":
        return image_folder.open_folder(config.path, split, config.eval_split)
    source = tfds_folder.open_split(config.path, split, config.subset)
    streamed = source.num_bytes > config.ram_gb * 2**30
    if streamed and not config.group_by:
        buffer = int(source.num_records * config.ram_gb * 2**30 / source.num_bytes)
        buffer = max(buffer // config.stream_parts, _LEAST_BUFFER)
        return [
            stream.Stream(part, config.shuffle, config.shuffle_seed, buffer)
            for part in source.cut(config.stream_parts)
        ]
    if streamed:
        raise UserError(
            f"config.data.group_by={config.group_by!r} needs {config.path} in memory: "
            f"config.data.ram_gb={source.num_bytes / 2**30:.1f} or more"
        )
    records = tfds_folder.read_records(source)
    if config.group_by:
        records = tfds_folder.sort_records(source, records, config.group_by)
    captions = [tfds_folder.captions_of(r, source.caption_feature) for r in records]
    name = f"{config.path} ({split})"
    return Examples(name, [r["image"] for r in records], captions)
