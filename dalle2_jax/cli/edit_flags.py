"""Flags of editing given images. What each is for is in brackets; other modes refuse it."""

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

IMAGE = flags.DEFINE_multi_string("image", [], "Image file; may be given several times.")
MASK = flags.DEFINE_string(
    "mask",
    None,
    "(inpaint) Mask image. Transparent pixels, or white ones if none are transparent, are "
    "regenerated. Default: the transparent pixels of --image.",
)
PREVIEW_MASK = flags.DEFINE_bool(
    "preview_mask",
    False,
    "(inpaint, outpaint) Write mask.png, which shows what would be regenerated; generate nothing.",
)
FEATHER = flags.DEFINE_integer(
    "feather",
    None,
    "(inpaint, outpaint) Width in pixels over which generated pixels blend into kept ones. "
    "Default: a 16th of the image's side.",
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
    "eta", 0.6, "(variations) DDIM's noise, 0 to 1: 0 changes the image least, 1 most."
)
THETA = flags.DEFINE_float(
    "theta", 0.5, "(text_diff) Share of the angle to the new text that is gone, 0 to 1."
)
OLD_PROMPT = flags.DEFINE_string("old_prompt", "a photo", "(text_diff) What --image shows now.")
X_T = flags.DEFINE_enum(
    "x_t",
    "slerp",
    ["slerp", "fixed"],
    "(interpolate) Between two images: move x_T too, or keep one x_T, sampled from --seed.",
)
