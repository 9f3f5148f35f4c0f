"""What the section `data` of a config says, checked; TensorFlow is not needed for it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.tokenizer import FULL_VOCAB_SIZE, Tokenizer
from dalle2_jax.validation import sections

SOURCES = ("emoji", "tfds", "folder")
_KINDS = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data` of a config.

    Attributes:
      source: "emoji" or "tfds" (a prepared TFDS directory), or "folder" (see folder_source).
      path: the directory.
      split, eval_split: what training and evaluation read; eval_split "" turns evaluation off.
      subset: which records to keep, e.g. "concrete" or "style=noto|twemoji"; TFDS only.
      image_size: side of the pictures in a batch.
      context_length, vocab_size: of the tokenizer.
      shuffle: a new order every epoch, by shuffle_seed; else file order.
      group_by: two records with the same value of this feature stay together in that order: a
        contrastive loss then has to tell apart pictures that differ in little else, such as the
        styles of one concept. Of a TFDS split held in memory.
      flip: mirror half of the pictures.
      crop_scale: (low, high): a random square of this share of the shorter side; (1, 1) the centre.
      ram_gb: encoded TFDS splits above this are streamed, through a shuffle buffer of this size: of
        such a split it decides the order too.
      stream_parts: into how many equal parts a streamed split is cut: each gives its share of every
        batch, and a host reads only its own parts, so that the number of hosts must divide it. It
        decides the order too; the number of hosts does not.
      decoded_gb: how much of the decoded pictures to keep in memory; 1e6 at most.
    """

    source: str = "emoji"
    path: str = "data/emoji"
    split: str = "train"
    eval_split: str = ""
    subset: str = ""
    image_size: int = 64
    context_length: int = 77
    vocab_size: int = FULL_VOCAB_SIZE
    shuffle: bool = True
    shuffle_seed: int = 0
    group_by: str = ""
    flip: bool = False
    crop_scale: tuple[float, float] = (1.0, 1.0)
    ram_gb: float = 2.0
    stream_parts: int = 1
    decoded_gb: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in _KINDS and not _is(value, kind):
                raise UserError(f"config.data.{field.name}={value!r} must be {_KINDS[kind]}")
        if self.source not in SOURCES:
            near = sections.near_miss(self.source, SOURCES)
            raise UserError(f"config.data.source={self.source!r} is unknown{near}")
        if not self.path.strip():  # else the current folder
            raise UserError("config.data.path is empty: name a folder")
        sections.check_range("config.data", 1, 2**31 - 1, image_size=self.image_size)
        sections.check_range("config.data", 1, 2**16, stream_parts=self.stream_parts)
        sections.check_range("config.data", 0, 2**32 - 1, shuffle_seed=self.shuffle_seed)
        sections.check_range("config.data", 0, 10**6, decoded_gb=self.decoded_gb)
        sections.check_range("config.data", 0, ram_gb=self.ram_gb)  # inf: never streamed
        Tokenizer(self.context_length, self.vocab_size)  # it knows which there are
        if not _is_crop_scale(self.crop_scale):
            raise UserError(
                f"config.data.crop_scale={self.crop_scale!r} must be two numbers (low, high) with "
                "0 < low <= high <= 1"
            )
        if self.subset and self.source == "folder":
            raise UserError(
                f"config.data.subset={self.subset!r} is for TFDS directories: "
                "--config.data.subset= reads all of a folder"
            )
        if self.group_by and (self.source == "folder" or not self.shuffle):
            raise UserError(
                f"config.data.group_by={self.group_by!r} is for TFDS directories, shuffled: "
                "--config.data.group_by= does without"
            )


def _is(value: Any, kind: type) -> bool:
    """Whether `value` will do for a setting of that kind; a bool, an int to Python, for no number.

    A path-like object is a text.
    """
    if isinstance(value, bool) or kind is bool:
        return type(value) is kind
    wider = {float: int, str: os.PathLike}.get(kind, kind)
    return isinstance(value, (kind, wider))


def _is_crop_scale(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(_is(v, float) for v in value) and 0 < value[0] <= value[1] <= 1
