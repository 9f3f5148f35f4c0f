"""The flags of sample.py that say what is done with pictures; the doing is in `strips`.

Nothing is imported here that takes time or starts threads: mistakes in the flags are told at once,
and so is Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from dalle2_jax.errors import UserError

GENERATE = "generate"
STEPS = 50  # of the decoder, unless told: a picture is inverted and drawn again in as many
_MANY = 10_000


class Mode(NamedTuple):
    """How many pictures and prompts a mode takes, from and to; and how they are given."""

    images: tuple[int, int]
    prompts: tuple[int, int]
    told: str


MODES = {
    "reconstruct": Mode((1, _MANY), (0, 0), "--image A"),
    "variations": Mode((1, _MANY), (0, 0), "--image A"),
    "interpolate": Mode((1, 2), (0, 1), '--image A --image B, or --prompt "..."'),
    "text_diff": Mode((1, 1), (1, 1), '--image A --prompt "..."'),
    "probe": Mode((1, 1), (0, 0), "--image A"),
}

MODE = flags.DEFINE_enum("mode", GENERATE, [GENERATE, *MODES], "What to do; see docs/pictures.md.")
PRIOR = flags.DEFINE_enum(
    "prior", None, ["diffusion", "ar", "none"], "Of a sentence; none: z_txt in place of z_img."
)
IMAGE = flags.DEFINE_multi_string("image", [], "A picture's file; may be given several times.")
FRAMES = flags.DEFINE_integer("frames", 7, "Pictures of interpolate and text_diff.", 2)
ETA = flags.DEFINE_float("eta", 0.6, "Of variations: 0 is the picture itself, 1 differs most.")
THETA = flags.DEFINE_float("theta", 0.5, "Of text_diff: the share of the way that is gone.")
OLD_PROMPT = flags.DEFINE_string("old_prompt", "a photo", "Of text_diff: what --image shows.")
X_T = flags.DEFINE_enum("x_t", "slerp", ["slerp", "fixed"], "Of interpolate, between pictures.")


def check(prompts: Sequence[str]) -> None:
    """UserError for pictures or prompts that the mode does not take."""
    if MODE.value == GENERATE:
        if IMAGE.value:
            raise UserError(f"--image={IMAGE.value[0]}: say by --mode what to do with it")
        if not prompts:
            raise UserError('nothing to draw: give --prompt "..." or --prompts_file FILE')
        return
    name, mode = MODE.value, MODES[MODE.value]
    given = {"--image": (len(IMAGE.value), mode.images), "--prompt": (len(prompts), mode.prompts)}
    count = len(IMAGE.value) + len(prompts)
    if name == "interpolate" and count != 2:
        raise UserError(f"--mode={name} takes two, not {count}: {mode.told}")
    for flag, (found, (low, high)) in given.items():
        if not low <= found <= high:
            raise UserError(f"--mode={name}: {found} times {flag}; it takes {mode.told}")
