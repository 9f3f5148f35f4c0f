"""The section `data` of a config, checked. TensorFlow is not needed for it."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.tokenizer import FULL_VOCAB_SIZE, Tokenizer
from dalle2_jax.validation import checks
from dalle2_jax.validation.sections import check_numbers, check_whole_numbers

SOURCES = ("emoji", "tfds", "folder")
_KINDS = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data` of a config.

    Attributes:
      source: "emoji" or "tfds" (a prepared TFDS directory), or "folder" (see
        `sources.image_folder`).
      path: the directory.
      split: what training reads.
      eval_split: what evaluation reads; "" turns evaluation off.
      subset: the records to keep, such as "concrete" or "style=noto|twemoji"; TFDS only.
      image_size: side of the images in a batch, in pixels.
      context_length: tokens of a caption; longer ones are cut.
      vocab_size: of the tokenizer.
      shuffle: whether every epoch has a new order, by shuffle_seed; else file order.
      shuffle_seed: fixes the order, and every random choice about an example.
      group_by: a feature; two records with the same value of it stay together in the order. A
        contrastive loss then has to tell apart images that differ in little else, such as the
        styles of one concept. Only for a TFDS split held in memory.
      flip: whether half of the images are mirrored, without a word in their captions. Records whose
        feature `mirrorable` is False stay as they are.
      background_share: the share of images put on one of their record's `backgrounds`, which the
        caption then names; the others stay on white. Needs the emoji set (see `data.attributes`).
      mirror_share: the share of `mirrorable` images that are mirrored, which the caption then says.
      crop_scale: (low, high), bounds of a random square's side as a share of the shorter side;
        (1, 1) is the centre square.
      ram_gb: encoded TFDS splits above this are streamed, through a shuffle buffer of this size.
        For a streamed split it also decides the order.
      stream_parts: the number of equal parts that a streamed split is cut into. Each part gives its
        share of every batch, and a host reads only its own parts, so the number of hosts must
        divide it. It decides the order too; the number of hosts does not.
      decoded_gb: how much of the decoded images to keep in memory; 1e6 at most.
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
    background_share: float = 0.0
    mirror_share: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    ram_gb: float = 2.0
    stream_parts: int = 1
    decoded_gb: float = 1.0

    def __post_init__(self) -> None:
        # Kinds come from the defaults, so a new setting is checked without a line here.
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in _KINDS:
                checks.require(_is(value, kind), f"config.data.{field.name}", _KINDS[kind], value)
        checks.one_of("config.data.source", self.source, SOURCES)
        if not self.path.strip():  # else the current folder
            raise UserError("config.data.path is empty: name a folder")
        check_whole_numbers("config.data", 1, 2**31 - 1, image_size=self.image_size)
        check_whole_numbers("config.data", 1, 2**16, stream_parts=self.stream_parts)
        check_whole_numbers("config.data", 0, 2**32 - 1, shuffle_seed=self.shuffle_seed)
        check_numbers("config.data", 0, 10**6, decoded_gb=self.decoded_gb)
        check_numbers("config.data", 0, math.inf, ram_gb=self.ram_gb)  # inf: never streamed
        check_numbers("config.data", 0, 1, background_share=self.background_share)
        check_numbers("config.data", 0, 1, mirror_share=self.mirror_share)
        Tokenizer(self.context_length, self.vocab_size)  # raises for sizes that it does not have
        checks.require(
            _is_crop_scale(self.crop_scale),
            "config.data.crop_scale",
            "two numbers (low, high) with 0 < low <= high <= 1",
            self.crop_scale,
        )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.subset and self.source == "folder":
            raise UserError(
                f"config.data.subset={self.subset!r} is for TFDS directories: "
                "--config.data.subset= reads all of a folder"
            )
        for name in ("background_share", "mirror_share"):
            if self.source == "folder" and getattr(self, name):
                raise UserError(
                    f"config.data.{name}={getattr(self, name)} is for the emoji set, not for a "
                    f"folder: --config.data.{name}=0 does without"
                )
        if self.flip and self.mirror_share:
            raise UserError(
                f"config.data.flip and config.data.mirror_share={self.mirror_share} both mirror "
                "images: set --config.data.noflip or --config.data.mirror_share=0"
            )
        if self.group_by and (self.source == "folder" or not self.shuffle):
            raise UserError(
                f"config.data.group_by={self.group_by!r} is for TFDS directories, shuffled: "
                "--config.data.group_by= does without"
            )


def _is(value: Any, kind: type) -> bool:
    """Whether `value` suits a setting of that kind.

    A whole number suits where a float does, and a path-like object suits where a text does. A bool
    is an int to Python, but suits only where a bool does.
    """
    if isinstance(value, bool) or kind is bool:
        return type(value) is kind
    also_accepted = {float: int, str: os.PathLike}.get(kind, kind)
    return isinstance(value, (kind, also_accepted))


def _is_crop_scale(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(_is(v, float) for v in value) and 0 < value[0] <= value[1] <= 1
