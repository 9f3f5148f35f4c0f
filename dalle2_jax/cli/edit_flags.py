"""Flags of editing images. In brackets stands which modes a flag is for; other modes refuse it."""

from __future__ import annotations

from absl import flags

MODE_NAMES = (
    "reconstruct",
    "variations",
    "interpolate",
    "text_diff",
    "probe",
    "inpaint",
    "outpaint",
)

IMAGE = flags.DEFINE_multi_string(
    "image",
    [],
    "(all edits) The image to edit: a PNG, JPEG, WebP, GIF, BMP or TIFF of any size. "
    "interpolate takes two, reconstruct and variations any number: repeat the flag.",
)
MASK = flags.DEFINE_string(
    "mask",
    None,
    "(inpaint) Mask image of the size of --image. Transparent pixels, or white ones if none are "
    "transparent, are regenerated. Default: the transparent pixels of --image.",
)
PREVIEW_MASK = flags.DEFINE_bool(
    "preview_mask",
    False,
    "(inpaint, outpaint) Write mask.png, which shows what would be regenerated; generate nothing.",
)
FEATHER = flags.DEFINE_integer(
    "feather",
    None,
    "(inpaint, outpaint) Width in pixels, inside the regenerated part, over which the colour step "
    "at the edge of the mask fades out. Default: a 16th of the side of the generated image.",
    0,
)
SIDES = {
    side: flags.DEFINE_integer(side, 0, f"(outpaint) Pixels to add {where}.", 0)
    for side, where in {
        "left": "on the left",
        "right": "on the right",
        "up": "above",
        "down": "below",
    }.items()
}
FRAMES = flags.DEFINE_integer(
    "frames", 7, "(interpolate, text_diff) Number of images from one end to the other.", 2
)
ETA = flags.DEFINE_float(
    "eta", 0.6, "(variations) DDIM's noise: 0 changes the image least, 1 most."
)
THETA = flags.DEFINE_float(
    "theta",
    0.5,
    "(text_diff) Share of the angle towards the new text that the last image reaches, 0 to 1.",
)
OLD_PROMPT = flags.DEFINE_string(
    "old_prompt",
    "a photo",
    "(text_diff) A text that says what --image shows now. The edit goes in the direction of "
    "--prompt minus --old_prompt.",
)
X_T = flags.DEFINE_enum(
    "x_t",
    "slerp",
    ["slerp", "fixed"],
    "(interpolate) Between two images: slerp moves x_T too, so that the ends are reconstructions; "
    "fixed keeps one x_T, sampled from --seed.",
)
