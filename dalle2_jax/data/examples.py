"""Captioned pictures with random access, in RAM or in files.

What every finite source is turned into. Pictures are decoded when first asked for and kept while a
budget of bytes lasts, so a small set is decoded once and a large one on the fly.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
from absl import logging

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode
from dalle2_jax.tokenizer import Tokenizer

CENTRE = (1.0, 0.5, 0.5)
_MAX_DAMAGED_IN_A_ROW = 100
_MAX_NAMED = 10


@dataclasses.dataclass
class Damage:
    """Pictures that could not be used: name -> why. Logged as they are met, the first few by name.

    Past those only the count is logged, each time it has doubled.
    """

    found: dict[str, str] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, why: Exception) -> None:
        with self._lock:  # threads decode, and a count that is skipped would not be logged
            if name in self.found:
                return
            self.found[name] = str(why)
            count = len(self.found)
        doublings, rest = divmod(count, _MAX_NAMED)
        if count <= _MAX_NAMED:
            logging.warning(
                "damaged picture %d: %s: %s; the next one takes its place", count, name, why
            )
        elif not rest and doublings.bit_count() == 1:
            logging.warning(
                "damaged pictures: the %d named and %d more", _MAX_NAMED, count - _MAX_NAMED
            )


@dataclasses.dataclass
class Examples:
    """n pictures (`bytes`, or a path to read) and for each at least one caption."""

    name: str
    pictures: Sequence[bytes | pathlib.Path]
    captions: Sequence[Sequence[str]]
    damage: Damage = dataclasses.field(default_factory=Damage)

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> bytes:
        """Picture `index` as stored. Raises UserError where its file is gone."""
        picture = self.pictures[index]
        try:
            return picture if isinstance(picture, bytes) else picture.read_bytes()
        except OSError as e:
            raise UserError(f"{self.picture_name(index)}: cannot be read ({e.strerror})") from e

    def first_picture(self) -> bytes:
        return self.read(0)

    def picture_name(self, index: int) -> str:
        picture = self.pictures[index]
        return str(picture) if isinstance(picture, pathlib.Path) else f"{self.name}, record {index}"

    def decode(self, index: int, size: int | None) -> tuple[np.ndarray, int]:
        """Picture `index`, or the next that is whole, and the index of the one that it is.

        The picture is uint8 [size, size, 3], or of its own size where `size` is None.

        Raises:
          UserError: a file is gone, or 100 pictures in a row are damaged.
        """
        for offset in range(min(len(self), _MAX_DAMAGED_IN_A_ROW)):
            i = (index + offset) % len(self)
            try:
                return decode.decode(self.read(i), size), i
            except decode.DamagedImage as e:
                self.damage.add(self.picture_name(i), e)
        raise UserError(
            f"{self.name}: {offset + 1} pictures in a row are damaged, the last one "
            f"{self.picture_name(i)} ({self.damage.found[self.picture_name(i)]})"
        )


class PictureCache:
    """Pictures of `examples` at `size`, decoded once while `budget` bytes last."""

    def __init__(self, examples: Examples, size: int, crops: bool, budget: int):
        self._examples, self._size, self._crops = examples, size, crops
        self._kept: list[tuple[np.ndarray, int] | None] = [None] * len(examples)
        self._budget, self._lock = budget, threading.Lock()

    def holds(self, indices: Sequence[int]) -> bool:
        """Whether `get` need decode none of these."""
        return all(self._kept[i] is not None for i in indices)

    def get(self, index: int, crop: tuple[float, float, float] = CENTRE) -> tuple[np.ndarray, int]:
        """uint8 [size, size, 3], and its index: another than asked for in place of a damaged one.

        `crop` is as in `decode.decode`, and used where the cache was told.
        """
        kept = self._kept[index]
        if kept is None:
            kept = self._examples.decode(index, None if self._crops else self._size)
            with self._lock:
                if self._kept[index] is None and self._budget >= kept[0].nbytes:
                    self._kept[index] = kept
                    self._budget -= kept[0].nbytes
        base, used = kept
        return (decode.crop_resize(base, self._size, crop) if self._crops else base), used


class TokenTable:
    """Every caption of `examples` as tokens, made once: 4 bytes a token.

    The share of captions that the context cuts is logged. Raises UserError where a record has none.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer):
        self._counts = np.array([len(c) for c in examples.captions], np.int64)
        bare = np.flatnonzero(self._counts == 0).tolist()
        if bare:
            raise UserError(
                f"{examples.picture_name(bare[0])}: no caption ({len(bare)} of {len(examples)} "
                "records lack one); prepare the data again without such records"
            )
        texts: dict[str, int] = {}
        rows = [texts.setdefault(t, len(texts)) for c in examples.captions for t in c]
        self._tokens = tokenizer(list(texts))
        self._rows = np.array(rows, np.int64)
        self._warn_if_cut(examples.name, list(texts), tokenizer)
        self._starts = np.cumsum(self._counts) - self._counts

    def _warn_if_cut(self, name: str, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        context = tokenizer.context_length
        is_cut = self._tokens[:, -1] != 0  # full at least: only these are measured
        full = np.flatnonzero(is_cut).tolist()
        is_cut[full] = [tokenizer.length(texts[i]) > context for i in full]
        cut = is_cut[self._rows]
        if cut.any():
            logging.warning(
                "%s: %d of %d captions (%.1f%%) are longer than context_length=%d and are cut",
                name,
                cut.sum(),
                len(cut),
                100 * cut.mean(),
                context,
            )

    def get(self, indices: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int32 [b, context]: for each index [b] the caption that its draw [b] in [0, 1) picks."""
        choice = np.minimum(
            (draws * self._counts[indices]).astype(np.int64), self._counts[indices] - 1
        )
        return self._tokens[self._rows[self._starts[indices] + choice]]
