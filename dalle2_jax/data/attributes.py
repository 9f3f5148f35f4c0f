"""Attributes that an example gets while training: a background colour, and being mirrored.

A record that takes part holds a drawing with its alpha (an RGBA `image`), the names of the colours
that it may stand on (`backgrounds`) and whether it may be mirrored (`mirrorable`). One record so
yields up to 9 x 2 images, and an epoch need not store them:

    uniforms [5] in [0, 1), a pure function of (seed, step, row)
    background = one of record.backgrounds  with probability background_share, else white
    mirrored   = record.mirrorable          and with probability mirror_share
    image      = alpha * drawing + (1 - alpha) * background colour, then mirrored
    caption    = one caption of the record + ", mirrored" + " on a blue background"

The words follow the image without exception. A caption without a background word therefore means
white, and one without a word for mirroring means the drawing as its maker published it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

WHITE = "white"
# name -> RGB. White needs no name in a caption; the others are the eight that captions name.
COLORS: dict[str, tuple[int, int, int]] = {
    WHITE: (255, 255, 255),
    "black": (16, 16, 16),
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (255, 221, 51),
    "green": (56, 142, 60),
    "blue": (30, 100, 220),
    "purple": (123, 31, 162),
    "pink": (255, 160, 200),
}
NAMED = tuple(name for name in COLORS if name != WHITE)

# The first is the canonical wording. {a}: the colour with its article.
BACKGROUND_WORDINGS = (
    "{text} on {a} background",
    "{text}, {color} background",
    "{text} on {color}",
    "{text} against {a} backdrop",
)
MIRROR_WORDINGS = (
    "{text}, mirrored",
    "{text}, flipped",
    "{text}, facing the other way",
    "mirror image of {text}",
)
NUM_UNIFORMS = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """The attributes of one example and the wordings, by index, that its caption uses for them."""

    background: str = WHITE
    mirrored: bool = False
    background_wording: int = 0
    mirror_wording: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the caption stays as it is: a white background, not mirrored."""
        return self.background == WHITE and not self.mirrored

    def describe(self, text: str) -> str:
        """Returns the caption `text` with words for what was chosen."""
        if self.mirrored:
            text = MIRROR_WORDINGS[self.mirror_wording].format(text=text)
        return name_background(text, self.background, self.background_wording)

    def paint(self, image: np.ndarray) -> np.ndarray:
        """Puts a drawing on the background and mirrors it: uint8 [h, w, 4] -> [h, w, 3]."""
        painted = paint(image, self.background)
        return painted[:, ::-1] if self.mirrored else painted


@dataclasses.dataclass(frozen=True)
class Shares:
    """Probabilities with which a record gets an attribute that it may have."""

    background: float = 0.0
    mirror: float = 0.0

    def __bool__(self) -> bool:
        return self.background > 0 or self.mirror > 0

    def choose(self, uniforms: np.ndarray, backgrounds: Sequence[str], mirrorable: bool) -> Choice:
        """Chooses the attributes of one example.

        Args:
          uniforms: float [NUM_UNIFORMS] in [0, 1); nothing else is random here.
          backgrounds: the colours that the record may stand on beside white.
          mirrorable: whether the record may be mirrored.
        """
        # All five numbers are read whatever the record allows, so that each decides one thing only.
        is_colored, color, color_wording, is_mirrored, mirror_wording = map(float, uniforms)
        background = WHITE
        if backgrounds and is_colored < self.background:
            background = backgrounds[_pick(color, len(backgrounds))]
        return Choice(
            background=background,
            mirrored=mirrorable and is_mirrored < self.mirror,
            background_wording=_pick(color_wording, len(BACKGROUND_WORDINGS)),
            mirror_wording=_pick(mirror_wording, len(MIRROR_WORDINGS)),
        )


def name_background(text: str, color: str, wording: int = 0) -> str:
    """Returns the caption `text` with words for the background; white needs none."""
    if color == WHITE:
        return text
    article = "an" if color[0] in "aeiou" else "a"
    return BACKGROUND_WORDINGS[wording].format(text=text, color=color, a=f"{article} {color}")


def longest_addition() -> Choice:
    """Returns the choice whose words make a caption longest: to see whether captions fit."""
    return Choice(background="purple", mirrored=True, background_wording=3, mirror_wording=2)


def paint(image: np.ndarray, color: str) -> np.ndarray:
    """Puts a drawing on a background: RGBA uint8 [..., 4] -> RGB uint8 [..., 3]."""
    # 255 * 255 fits into 16 bits: half the memory of float32. Adding 127 rounds to the nearest.
    alpha = image[..., 3:].astype(np.uint16)
    background = np.array(COLORS[color], np.uint16)
    mixed = image[..., :3] * alpha + background * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _pick(uniform: float, count: int) -> int:
    return min(int(uniform * count), count - 1)
