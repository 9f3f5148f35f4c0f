"""The flags of sample.py that say what is done with pictures; the doing is in `strips`.

Nothing is imported here that takes time or starts threads: mistakes in the flags are told at once,
and so is Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths

GENERATE = "generate"
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
    "inpaint": Mode((1, 1), (0, 1), '--image A --mask M --prompt "..."'),
    "outpaint": Mode((1, 1), (0, 1), '--image A --right 64 --prompt "..."'),
}

PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file with a prompt a line.")
N = flags.DEFINE_integer("n", 4, "Pictures a prompt.")
MODE = flags.DEFINE_enum("mode", GENERATE, [GENERATE, *MODES], "What to do; see docs/pictures.md.")
SIZE = flags.DEFINE_integer("size", None, "Side of the pictures in pixels, as 128, 512 or 1024.")
PRIOR = flags.DEFINE_enum(
    "prior", None, ["diffusion", "ar", "none"], "Of a sentence; none: z_txt in place of z_img."
)
IMAGE = flags.DEFINE_multi_string("image", [], "A picture's file; may be given several times.")
FRAMES = flags.DEFINE_integer("frames", 7, "Pictures of interpolate and text_diff.", 2)
ETA = flags.DEFINE_float("eta", 0.6, "Of variations: 0 differs least, 1 most.")
THETA = flags.DEFINE_float("theta", 0.5, "Of text_diff: the share of the way that is gone.")
OLD_PROMPT = flags.DEFINE_string("old_prompt", "a photo", "Of text_diff: what --image shows.")
X_T = flags.DEFINE_enum("x_t", "slerp", ["slerp", "fixed"], "Of interpolate, between pictures.")

MASK = flags.DEFINE_string(
    "mask", None, "Of inpaint: alpha 0, or white, where --image is drawn anew; else its own alpha."
)
PREVIEW_MASK = flags.DEFINE_bool(
    "preview_mask", False, "Of inpaint and outpaint: show what would be drawn, and draw nothing."
)
FEATHER = flags.DEFINE_integer(
    "feather",
    None,
    "Of inpaint and outpaint: pixels over which the new passes into the old.",
    0,
)
SIDES = {
    side: flags.DEFINE_integer(side, 0, f"Of outpaint: pixels to add {where}.", 0)
    for side, where in {
        "left": "on the left",
        "right": "on the right",
        "up": "above",
        "down": "below",
    }.items()
}
BEST_OF = flags.DEFINE_integer(
    "best_of", None, "Draw so many of a prompt; the --n nearest to it by CLIP are kept.", 1
)


# What a flag is of; those that are not here are every mode's.
_OF = {
    "prior": (GENERATE, "interpolate", "inpaint", "outpaint"),
    "n": (GENERATE, "variations", "inpaint", "outpaint"),
    "frames": ("interpolate", "text_diff"),
    "eta": ("variations",),
    "theta": ("text_diff",),
    "old_prompt": ("text_diff",),
    "x_t": ("interpolate",),
    "mask": ("inpaint",),
    "preview_mask": ("inpaint", "outpaint"),
    "feather": ("inpaint", "outpaint"),
    **dict.fromkeys(SIDES, ("outpaint",)),
    "best_of": (GENERATE,),
}


def check(prompts: Sequence[str]) -> None:
    """UserError for pictures, prompts and flags that the mode does not take."""
    for flag, of in _OF.items():
        asked = flags.FLAGS[flag]
        if asked.present and asked.value != asked.default and MODE.value not in of:
            raise UserError(f"--{flag} goes with --mode={' or '.join(of)}, not {MODE.value}")
    if MODE.value == "outpaint" and not any(flag.value for flag in SIDES.values()):
        raise UserError("--mode=outpaint: say by --left, --right, --up, --down, in pixels, how far")
    for flag in (IMAGE, MASK):
        if "" in (flag.value if isinstance(flag.value, list) else [flag.value]):
            raise UserError(f"--{flag.name}= names no file")
    if MODE.value == GENERATE:
        if IMAGE.value:
            raise UserError(f"--image={IMAGE.value[0]}: say by --mode what to do with it")
        if not prompts:
            raise UserError('nothing to draw: give --prompt "..." or --prompts_file FILE')
        if BEST_OF.value is not None and BEST_OF.value < N.value:
            told = f"--best_of={BEST_OF.value} must be --n={N.value} at least"
            raise UserError(f"{told}, which are kept")
        return
    name, mode = MODE.value, MODES[MODE.value]
    given = {"--image": (len(IMAGE.value), mode.images), "--prompt": (len(prompts), mode.prompts)}
    count = len(IMAGE.value) + len(prompts)
    if name == "interpolate" and count != 2:
        raise UserError(f"--mode={name} takes two, not {count}: {mode.told}")
    for flag, (found, (low, high)) in given.items():
        if not low <= found <= high:
            raise UserError(f"--mode={name}: {found} times {flag}; it takes {mode.told}")


def told() -> dict[str, object]:
    """The values of the flags that are of the mode alone."""
    return {flag: flags.FLAGS[flag].value for flag, of in _OF.items() if MODE.value in of}


def prompts() -> list[str]:
    """Those of the flags, checked."""
    texts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        try:
            file = paths.to_path(PROMPTS_FILE.value)
            with paths.told("cannot read", file):
                text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file={PROMPTS_FILE.value}: {error}") from error
        texts += [line.strip() for line in text.splitlines() if line.strip()]
    check(texts)
    return texts
