"""Batches {"image": uint8 [b, h, w, 3], "tokens": int32 [b, context]} by step, for every source.

Why the order is a pure function of position. A run reads a sequence of examples. Instead of an
iterator, whose hidden state would have to be saved with every checkpoint and kept equal on every
host, this module computes what stands at any place of the sequence:

    place  = step * batch_size + row             of a run; row 0 ... batch_size - 1
    epoch  = place // n                          n examples, or n less a group that is not full
    index  = permutation(seed, epoch)[place % n]     computed for one place alone, in O(1)
    uniforms = random(seed, step)[row]           caption, crop, mirroring, attributes

    `permutation` is a keyed bijection of 0 ... n - 1 (tf.raw_ops.RandomIndexShuffle), so no host
    holds a shuffled list.

Hence a run resumes at any step at once, without a saved iterator. The batches of several hosts
together are those of one host, because each host takes its rows of the same batch. And what a step
saw can be looked up later. Only splits that do not fit into memory (`stream`) read records in file
order through a shuffle buffer: seed and epoch fix their order too, but resuming reads past the
records before.

    tf.data                        one worker thread                  decoder threads
    plan: index, uniforms  ---->   images and tokens of a batch <---- decode, crop
                                   attributes, mirroring
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

from dalle2_jax.data import attributes, stream
from dalle2_jax.data.attributes import Choice
from dalle2_jax.data.config import DataConfig
from dalle2_jax.data.examples import Damage, Examples, ImageCache, TokenTable
from dalle2_jax.data.sources import image_folder, tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode
from dalle2_jax.imaging.crops import CENTRE
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.validation import sections

_PREFETCH = 3
_GROUP_SIZE = 2
_MIN_BUFFER = 16  # records
# Random numbers of an example: caption, crop's scale, y and x, and whether `flip` mirrors it.
_NUM_UNIFORMS = 5
# Seeds are below 2**32. Attributes use one that no run has: captions and crops do not depend on
# whether a run uses attributes.
_ATTRIBUTE_SEED = 2**32


class Batches:
    """start step -> an endless iterator of this host's share of each batch, from that step on.

    Args:
      config: the section `data` of a config.
      split: what to read.
      batch_size: rows of a batch, of all hosts together.
      rows: int [b], the rows of each batch that this host reads, in ascending order.

    Attributes:
      num_examples: in an epoch.
      damaged: image -> why another one took its place.
    """

    def __init__(self, config: DataConfig, split: str, batch_size: int, rows: np.ndarray):
        self._config, self._batch_size, self._rows = config, batch_size, rows
        self._tokenizer = Tokenizer(config.context_length, config.vocab_size)
        self._random_crops = tuple(config.crop_scale) != (1.0, 1.0)
        self._shares = attributes.Shares(config.background_share, config.mirror_share)
        self._damage = Damage()
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._decoders = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        name = f"{config.path} ({split})"
        source = _open(config, split)
        self._streams: list[stream.Stream] = []  # those that this host reads, one for each part
        if isinstance(source, list):
            self._open_streams(source)
            first_image = self._streams[0].first_image()
        else:
            self._open_examples(source)
            first_image = source.first_image()
        self._group_size = _GROUP_SIZE if config.group_by else 1
        if self._group_size > self.num_examples:
            raise UserError(
                f"config.data.group_by={config.group_by!r}, but {name} holds only "
                f"{self.num_examples} record"
            )
        if batch_size > self.num_examples:
            logging.warning(
                "%s: batch_size=%d but only %d images: each batch repeats some",
                name,
                batch_size,
                self.num_examples,
            )
        _warn_if_small(first_image, name, config.image_size)

    def _open_streams(self, source: list[stream.Stream]) -> None:
        """Chooses the parts of a streamed split that this host reads."""
        if self._batch_size % len(source):
            raise UserError(
                f"batch_size={self._batch_size} is not a multiple of "
                f"config.data.stream_parts={len(source)}"
            )
        self._part_size = self._batch_size // len(source)
        self._parts = sorted(set((self._rows // self._part_size).tolist()))
        if len(self._parts) * self._part_size != len(self._rows):
            enough = _min_whole_parts(self._rows, self._batch_size)
            raise UserError(
                f"config.data.stream_parts={len(source)}: this host's devices hold "
                f"{len(self._rows)} of {self._batch_size} rows, which are no whole parts, so that "
                f"several hosts would read the same; set --config.data.stream_parts={enough}"
            )
        self._streams = [source[part] for part in self._parts]
        self.num_examples = sum(len(part) for part in source)

    def _open_examples(self, source: Examples) -> None:
        """Makes the tables of a split in memory."""
        config = self._config
        self.num_examples = len(source)
        source.damage = self._damage
        self._examples = source
        self._tokens = TokenTable(source, self._tokenizer, self._shares)
        self._cache = ImageCache(
            source,
            config.image_size,
            crops=self._random_crops,
            budget=int(config.decoded_gb * 2**30),
            keep_alpha=bool(self._shares),
        )

    @property
    def damaged(self) -> Mapping[str, str]:
        return self._damage.reasons

    def __call__(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields numpy batches from `start_step` on, made ahead in a thread.

        Raises:
          UserError: while reading: a file is gone, a shard is damaged, too many images are damaged,
            a streamed record has no caption.
        """
        # Resuming is starting the range elsewhere.
        plans = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max).map(self._plan)
        if self._streams:
            records = [part.batches(start_step, self._part_size) for part in self._streams]
            plans = tf.data.Dataset.zip(plans, *records).map(_join_parts)
        options = tf.data.Options()
        # Without this, tf.data may hand out elements as they become ready.
        options.deterministic = True
        options.threading.private_threadpool_size = 2
        make: Callable[..., dict[str, np.ndarray]]
        make = self._make_from_stream if self._streams else self._make_from_memory
        # The Python part stays outside tf.data: a tf.numpy_function that runs while the interpreter
        # exits hangs it, and its errors come back as text.
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        tf_error = tf.errors.OpError  # by a name that outlives the module at exit
        try:
            numpy_plans: Any = plans.prefetch(_PREFETCH).with_options(options).as_numpy_iterator()
            for plan in numpy_plans:
                ahead.append(self._worker.submit(make, **plan))
                # One thread makes the batches in order; up to _PREFETCH of them wait here.
                if len(ahead) > _PREFETCH:
                    yield ahead.popleft().result()
        except tf_error as e:
            message = " ".join(e.message.split())[:200]
            raise UserError(f"{self._config.path}: cannot be read on ({message})") from e
        finally:
            for future in ahead:
                future.cancel()

    @tf.autograph.experimental.do_not_convert
    def _plan(self, step: tf.Tensor) -> dict[str, tf.Tensor]:
        """Computes what this host reads at `step`, as the module's docstring says.

        Returns:
          `index` int64 [b], `uniforms` float [b, _NUM_UNIFORMS] and `attribute_uniforms`
          float [b, attributes.NUM_UNIFORMS], b rows of this host.
        """
        config, n, size = self._config, self.num_examples, self._group_size
        # The places of the global batch, for all hosts alike; this host's rows are gathered at the
        # end. Computing a few numbers too many is cheaper than making the order depend on hosts.
        place = step * self._batch_size + tf.range(self._batch_size, dtype=tf.int64)
        # With groups, n % size examples are left over in each epoch; the shift below lets others be
        # left over in the next.
        epoch, index = place // (n - n % size), place % (n - n % size)
        if config.shuffle and not self._streams:
            # Groups are permuted as wholes, and the examples of a group keep their order: they were
            # sorted by the feature of config.data.group_by.
            within = index % size
            index = self._shuffled(index // size, epoch, 0, n // size) * size + within
            if size > 1:  # move where the groups begin, or some would always be cut in two
                index = (index + self._shuffled(tf.zeros_like(index), epoch, 1, n)) % n
        seed = tf.cast(config.shuffle_seed, tf.int64)
        uniforms = tf.random.stateless_uniform(
            [self._batch_size, _NUM_UNIFORMS], tf.stack([seed, step])
        )
        plan = {"index": index, "uniforms": uniforms}
        if self._shares:
            plan["attribute_uniforms"] = tf.random.stateless_uniform(
                [self._batch_size, attributes.NUM_UNIFORMS],
                tf.stack([seed + _ATTRIBUTE_SEED, step]),
            )
        return {name: tf.gather(value, self._rows) for name, value in plan.items()}

    def _shuffled(self, index: tf.Tensor, epoch: tf.Tensor, salt: int, n: int) -> tf.Tensor:
        """Applies a permutation of 0 ... n - 1, chosen by `epoch` [b] and `salt`, to `index`
        [b]."""
        ones = tf.ones_like(epoch)
        # The op itself: tf.random.experimental.index_shuffle takes one seed for all rows only.
        return tf.raw_ops.RandomIndexShuffle(
            index=index,
            seed=tf.stack([self._config.shuffle_seed * ones, epoch, salt * ones], 1),
            max_index=(n - 1) * ones,
        )

    def _make_from_memory(
        self, index: np.ndarray, uniforms: np.ndarray, attribute_uniforms: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Makes a batch of a split in memory from its plan; see `_plan` for the shapes."""
        indices = index.tolist()
        # Handing images that are decoded already to threads costs more than it saves.
        run = map if self._cache.holds(indices) else self._decoders.map
        images, used = zip(*run(self._cache.get, indices, self._crops(uniforms)), strict=True)
        backgrounds, mirrorable = zip(*map(self._examples.attributes, used), strict=True)
        choices = self._choose(attribute_uniforms, backgrounds, mirrorable)
        return {
            "image": self._finish(images, uniforms, mirrorable, choices),
            "tokens": self._tokens.get(np.array(used), uniforms[:, 0], choices),
        }

    def _make_from_stream(
        self,
        index: np.ndarray,
        uniforms: np.ndarray,
        image: np.ndarray,
        caption: np.ndarray,
        number_if_empty: np.ndarray,
        backgrounds: np.ndarray,
        mirrorable: np.ndarray,
        attribute_uniforms: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes a batch of this host's parts of a stream; see `Stream.batches` for the shapes."""
        del index  # the stream's own order
        size = self._part_size
        self._streams[0].require_captions(number_if_empty)
        # The rows of a host lie part after part, and each part has `size` consecutive rows of the
        # batch. A damaged image gives way to another of the same part, or hosts would differ.
        windows = {
            part: stream.Window(
                image[i * size : (i + 1) * size],
                self._config.image_size,
                self._damage,
                keep_alpha=bool(self._shares),
            )
            for i, part in enumerate(self._parts)
        }
        first = {part: i * size for i, part in enumerate(self._parts)}

        def get(row: int, crop: tuple[float, float, float]) -> tuple[np.ndarray, int]:
            part, place = divmod(row, size)
            decoded, used = windows[part].get(place, crop)
            return decoded, first[part] + used

        decoded = self._decoders.map(get, self._rows.tolist(), self._crops(uniforms))
        images, used = zip(*decoded, strict=True)
        can_mirror = mirrorable[list(used)].tolist()
        colors = [stream.split_names(names) for names in backgrounds[list(used)]]
        choices = self._choose(attribute_uniforms, colors, can_mirror)
        texts = [c.decode("utf-8", "replace") for c in caption[list(used)]]
        if choices:
            texts = [choice.describe(t) for choice, t in zip(choices, texts, strict=True)]
        return {
            "image": self._finish(images, uniforms, can_mirror, choices),
            "tokens": self._tokenizer(texts),
        }

    def _crops(self, uniforms: np.ndarray) -> list[tuple[float, float, float]]:
        if not self._random_crops:
            return [CENTRE] * len(uniforms)
        low, high = self._config.crop_scale
        return [(low + (high - low) * float(s), float(y), float(x)) for s, y, x in uniforms[:, 1:4]]

    def _choose(
        self,
        attribute_uniforms: np.ndarray | None,
        backgrounds: Sequence[Sequence[str]],
        mirrorable: Sequence[bool],
    ) -> list[Choice]:
        """Chooses the attributes of each row; empty where the config asks for none."""
        if attribute_uniforms is None:
            return []
        rows = zip(attribute_uniforms, backgrounds, mirrorable, strict=True)
        return [self._shares.choose(*row) for row in rows]

    def _finish(
        self,
        images: Sequence[np.ndarray],
        uniforms: np.ndarray,
        mirrorable: Sequence[bool],
        choices: Sequence[Choice],
    ) -> np.ndarray:
        """Applies attributes and `flip`: uint8 [b, h, w, 3]."""
        # An image that its caption calls mirrored is not mirrored again by `flip`: the config
        # refuses to set both.
        if choices:
            images = [choice.paint(image) for choice, image in zip(choices, images, strict=True)]
        batch = np.stack(images)
        if self._config.flip:
            mirrored = (uniforms[:, 4] < 0.5) & np.array(mirrorable, bool)
            batch[mirrored] = batch[mirrored, :, ::-1]
        return batch


def make_dataset(
    config: Mapping[str, Any],
    *,
    batch_size: int,
    split: str | None = None,
    rows: np.ndarray | None = None,
) -> Batches:
    """Opens the data of a config.

    Args:
      config: its section `data`; see DataConfig.
      batch_size: rows of a batch, of all hosts together.
      split: what to read; the config's if None.
      rows: int [b], the rows of each batch that this host reads; all if None.

    Returns:
      `Batches`: call it with the step to start from.

    Raises:
      UserError: an unknown key or source, a value of the wrong kind or out of range, a missing or
        empty path, or what the source raises.
    """
    data = sections.construct(DataConfig, config, "config.data")
    all_rows = np.arange(batch_size)
    return Batches(data, split or data.split, batch_size, all_rows if rows is None else rows)


def _warn_if_small(image: bytes, name: str, image_size: int) -> None:
    """Looks at the first image: a data set prepared too small blurs everything it teaches."""
    try:
        side = min(decode.decode(image).shape[:2])
    except decode.DamagedImage:
        return  # reported when a batch meets it
    if side < image_size:
        logging.warning(
            "%s: images of %d px, enlarged to image_size=%d: prepare larger ones",
            name,
            side,
            image_size,
        )


def _join_parts(plan: dict[str, Any], *records: dict[str, Any]) -> dict[str, Any]:
    """A host's plan and the records of its parts, row after row."""
    return plan | {k: tf.concat([record[k] for record in records], 0) for k in records[0]}


def _min_whole_parts(rows: np.ndarray, batch_size: int) -> int:
    """The fewest equal parts of a batch such that `rows` (ascending) consist of whole parts."""
    # Where a run of consecutive rows begins or ends, a part must begin or end: the size of a part
    # divides all these places, and the batch.
    breaks = np.flatnonzero(np.diff(rows) > 1)
    edges = [rows[0], rows[-1] + 1, *(rows[breaks] + 1), *rows[breaks + 1]]
    return batch_size // math.gcd(batch_size, *map(int, edges))


def _open(config: DataConfig, split: str) -> Examples | list[stream.Stream]:
    """Opens a split in memory, or as one stream for each of config.stream_parts."""
    if config.source == "folder":
        return image_folder.open_folder(config.path, split, config.eval_split)
    source = tfds_folder.open_split(config.path, split, config.subset)
    tfds_folder.check_attributes(source, config.background_share, config.mirror_share)
    # num_bytes are encoded records before `subset`: an upper bound that needs no reading.
    is_streamed = source.num_bytes > config.ram_gb * 2**30
    if is_streamed and not config.group_by:
        buffer = int(source.num_records * config.ram_gb * 2**30 / source.num_bytes)
        buffer = max(buffer // config.stream_parts, _MIN_BUFFER)
        return [
            stream.Stream(part, config.shuffle, config.shuffle_seed, buffer)
            for part in source.cut(config.stream_parts)
        ]
    if is_streamed:
        raise UserError(
            f"config.data.group_by={config.group_by!r} needs {config.path} in memory: "
            f"config.data.ram_gb={source.num_bytes / 2**30:.1f} or more"
        )
    records = tfds_folder.read_records(source)
    if config.group_by:
        records = tfds_folder.sort_records(source, records, config.group_by)
    backgrounds, mirrorable = tfds_folder.attributes_of(records)
    return Examples(
        name=f"{config.path} ({split})",
        images=[record["image"] for record in records],
        captions=[tfds_folder.captions_of(r, source.caption_feature) for r in records],
        backgrounds=backgrounds,
        mirrorable=mirrorable,
    )
