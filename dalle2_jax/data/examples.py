"""Captioned images with random access, in memory or in files.

Every finite source becomes `Examples`. Images are decoded when first asked for and kept while a
budget of bytes lasts: a small set is decoded once, a large one on the fly.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
from absl import logging

from dalle2_jax.data.attributes import NUM_UNIFORMS, Choice, Shares, longest_addition
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import decode
from dalle2_jax.imaging.crops import CENTRE, Crop, crop_resize
from dalle2_jax.tokenizer import Tokenizer

_MAX_DAMAGED_IN_A_ROW = 100
_MAX_NAMED = 10


@dataclasses.dataclass
class Damage:
    """Images that could not be used: name -> why. Logged as they are met, the first few by name.

    Past those only the count is logged, each time it has doubled.
    """

    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, error: Exception) -> None:
        """Counts and logs an image, unless it was met before."""
        with self._lock:  # threads decode; without the lock a count, and its line, could be skipped
            if name in self.reasons:
                return
            self.reasons[name] = str(error)
            count = len(self.reasons)
        doublings, rest = divmod(count, _MAX_NAMED)
        if count <= _MAX_NAMED:
            logging.warning(
                "damaged image %d: %s: %s; the next one takes its place", count, name, error
            )
        elif not rest and doublings.bit_count() == 1:
            logging.warning(
                "damaged images: the %d named and %d more", _MAX_NAMED, count - _MAX_NAMED
            )


@dataclasses.dataclass
class Examples:
    """n images and their captions, with random access.

    Attributes:
      name: names the source in messages.
      images: encoded, or paths to read.
      captions: at least one for each image.
      backgrounds: for each image the colours that it may stand on; empty if the source has none.
      mirrorable: for each image whether it may be mirrored; empty if the source does not say.
      damage: collects the images that could not be decoded.
    """

    name: str
    images: Sequence[bytes | pathlib.Path]
    captions: Sequence[Sequence[str]]
    backgrounds: Sequence[Sequence[str]] = ()
    mirrorable: Sequence[bool] = ()
    damage: Damage = dataclasses.field(default_factory=Damage)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        """Returns image `index` as stored. Raises UserError where its file is gone."""
        image = self.images[index]
        try:
            return image if isinstance(image, bytes) else image.read_bytes()
        except OSError as e:
            raise UserError(f"{self.image_name(index)}: cannot be read ({e.strerror})") from e

    def attributes(self, index: int) -> tuple[Sequence[str], bool]:
        """Returns the backgrounds that image `index` may stand on, and whether it may be mirrored.

        Where the source does not say, there are no backgrounds, and it may.
        """
        backgrounds = self.backgrounds[index] if self.backgrounds else ()
        return backgrounds, self.mirrorable[index] if self.mirrorable else True

    def first_image(self) -> bytes:
        """Returns the first image as stored."""
        return self.read(0)

    def image_name(self, index: int) -> str:
        """Returns the file of image `index`, or its place in the source, for messages."""
        image = self.images[index]
        return str(image) if isinstance(image, pathlib.Path) else f"{self.name}, record {index}"

    def decode(
        self, index: int, size: int | None, keep_alpha: bool = False
    ) -> tuple[np.ndarray, int]:
        """Decodes image `index`, or the next one after it that is not damaged.

        Args:
          index: of the image.
          size: side of the result; None keeps the image's own size.
          keep_alpha: return RGBA rather than RGB over white.

        Returns:
          uint8 [size, size, 3 or 4], and the index of the image that it is.

        Raises:
          UserError: a file is gone, or 100 images in a row are damaged.
        """
        # The next image, not a random one: what a place shows stays a function of the place.
        for offset in range(min(len(self), _MAX_DAMAGED_IN_A_ROW)):
            i = (index + offset) % len(self)
            try:
                return decode.decode(self.read(i), size, keep_alpha=keep_alpha), i
            except decode.DamagedImage as e:
                self.damage.add(self.image_name(i), e)
        raise UserError(
            f"{self.name}: {offset + 1} images in a row are damaged, the last one "
            f"{self.image_name(i)} ({self.damage.reasons[self.image_name(i)]})"
        )


class ImageCache:
    """Images of `examples` at one size, decoded once while a budget of bytes lasts.

    Args:
      examples: where they come from.
      size: side of what `get` returns.
      crops: whether `get` cuts squares out; the images are then kept at their own size.
      budget: bytes of decoded images to keep.
      keep_alpha: whether images are RGBA rather than RGB over white.
    """

    def __init__(
        self, examples: Examples, size: int, crops: bool, budget: int, keep_alpha: bool = False
    ):
        self._examples, self._size, self._crops = examples, size, crops
        self._decoded: list[tuple[np.ndarray, int] | None] = [None] * len(examples)
        self._budget, self._keep_alpha, self._lock = budget, keep_alpha, threading.Lock()

    def holds(self, indices: Sequence[int]) -> bool:
        """Whether `get` need decode none of these."""
        return all(self._decoded[i] is not None for i in indices)

    def get(self, index: int, crop: Crop = CENTRE) -> tuple[np.ndarray, int]:
        """Returns uint8 [size, size, 3 or 4] and its index: a damaged image gives way to the next.

        `crop` is as in `decode.decode`, and used only by a cache made with `crops`.
        """
        # Read without the lock: a slot goes from None to its final value once, and two threads that
        # decode the same image at once get the same pixels.
        decoded = self._decoded[index]
        if decoded is None:
            size = None if self._crops else self._size
            decoded = self._examples.decode(index, size, self._keep_alpha)
            with self._lock:
                if self._decoded[index] is None and self._budget >= decoded[0].nbytes:
                    self._decoded[index] = decoded
                    self._budget -= decoded[0].nbytes
        image, used = decoded
        return (crop_resize(image, self._size, crop) if self._crops else image), used


class TokenTable:
    """Every caption of `examples` as tokens, made once: 4 bytes a token.

    The share of captions that the context cuts is logged; where `shares` adds words for attributes,
    it is an estimate with them. Raises UserError where a record has no caption.
    """

    def __init__(self, examples: Examples, tokenizer: Tokenizer, shares: Shares):
        self._counts = np.array([len(c) for c in examples.captions], np.int64)
        empty = np.flatnonzero(self._counts == 0).tolist()
        if empty:
            raise UserError(
                f"{examples.image_name(empty[0])}: no caption ({len(empty)} of {len(examples)} "
                "records lack one); prepare the data again without such records"
            )
        # Captions of all records lie end to end in `_rows`, as rows of `_tokens`; each different
        # text is tokenized once. Record i has those from `_starts[i]` on, `_counts[i]` of them.
        texts: dict[str, int] = {}
        rows = [texts.setdefault(t, len(texts)) for c in examples.captions for t in c]
        self._tokenizer, self._texts = tokenizer, list(texts)
        self._tokens = tokenizer(self._texts)
        self._rows = np.array(rows, np.int64)
        self._warn_if_cut(examples, shares)
        self._starts = np.cumsum(self._counts) - self._counts

    def _warn_if_cut(self, examples: Examples, shares: Shares) -> None:
        context = self._tokenizer.context_length
        longest = self._tokenizer.length(longest_addition().describe("")) - 2 if shares else 0
        # A caption of context - longest tokens or more has a token at this place. Only these
        # captions can be cut, and only these are measured, each with one random choice of words.
        may_be_cut = self._tokens[:, max(0, context - longest - 1)] != 0
        rng, cut = np.random.default_rng(0), 0
        owners = np.repeat(np.arange(len(examples)), self._counts)
        for row in np.flatnonzero(may_be_cut[self._rows]).tolist():
            text, owner = self._texts[self._rows[row]], owners[row]
            if shares:
                backgrounds, mirrorable = examples.attributes(owner)
                choice = shares.choose(rng.random(NUM_UNIFORMS), backgrounds, mirrorable)
                text = choice.describe(text)
            cut += self._tokenizer.length(text) > context
        count = len(self._rows)
        if cut:
            logging.warning(
                "%s: %d of %d captions (%.1f%%) are longer than context_length=%d and are cut",
                examples.name,
                cut,
                count,
                100 * cut / count,
                context,
            )

    def get(
        self, indices: np.ndarray, uniforms: np.ndarray, choices: Sequence[Choice] = ()
    ) -> np.ndarray:
        """Returns one caption of each example as tokens.

        Args:
          indices: int [b], of the examples.
          uniforms: float [b] in [0, 1), which pick the captions.
          choices: [b], what each caption says beside; none if empty.

        Returns:
          int32 [b, context].
        """
        counts = self._counts[indices]
        choice = np.minimum((uniforms * counts).astype(np.int64), counts - 1)
        rows = self._rows[self._starts[indices] + choice]
        tokens = self._tokens[rows]
        # Captions with words for attributes are too many to tabulate: those of a batch are
        # tokenized when they are needed.
        changed = [i for i, choice in enumerate(choices) if not choice.is_plain]
        if changed:
            texts = [choices[i].describe(self._texts[rows[i]]) for i in changed]
            tokens[changed] = self._tokenizer(texts)
        return tokens
