"""The modes of a request and what each takes. Plain data, so that flags are checked at once."""

from __future__ import annotations

from typing import NamedTuple


class Mode(NamedTuple):
    """The inputs of a mode.

    Attributes:
        images: least and most number of images.
        prompts: least and most number of prompts.
        example: both in words, for messages.
    """

    images: tuple[int, int]
    prompts: tuple[int, int]
    example: str


_MANY = 10_000
GENERATE = "generate"
MODES = {
    GENERATE: Mode((0, 0), (1, _MANY), 'a prompt, as "a red apple"'),
    "reconstruct": Mode((1, _MANY), (0, 0), "an image"),
    "variations": Mode((1, _MANY), (0, 0), "an image"),
    "interpolate": Mode((1, 2), (0, 1), "two images, or an image and a prompt"),
    "text_diff": Mode((1, 1), (1, 1), "an image and a prompt"),
    "probe": Mode((1, 1), (0, 0), "an image"),
    "inpaint": Mode((1, 1), (0, 1), "an image, a mask and a prompt"),
    "outpaint": Mode((1, 1), (0, 1), "an image, a margin and a prompt"),
}
MARGINS = ("left", "right", "up", "down")
X_T_CHOICES = ("slerp", "fixed")
# field of a Request -> the modes that take it; every mode takes a field that is not listed.
MODES_OF = {
    "prior": (GENERATE, "interpolate", "inpaint", "outpaint"),
    "n": (GENERATE, "variations", "inpaint", "outpaint"),
    "best_of": (GENERATE,),
    "frames": ("interpolate", "text_diff"),
    "eta": ("variations",),
    "theta": ("text_diff",),
    "old_prompt": ("text_diff",),
    "x_T": ("interpolate",),
    "mask": ("inpaint",),
    "feather": ("inpaint", "outpaint"),
    **dict.fromkeys(MARGINS, ("outpaint",)),
    "overlap": ("outpaint",),
}


def takes(mode: str, field: str) -> bool:
    """Returns whether a mode takes a field of a Request."""
    return mode in MODES_OF.get(field, (mode,))
