"""The modes of a request: what each takes. Plain data, so that flags are checked at once."""

from __future__ import annotations

from typing import NamedTuple


class Mode(NamedTuple):
    """Numbers of images and prompts that a mode takes, from and to, and an example in words."""

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
# The modes that a field is for; fields that are not listed are for all.
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
