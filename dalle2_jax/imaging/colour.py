"""Colours of an image file -> sRGB, by the colour profile that the file carries.

About one photograph in six is tagged with a wide gamut such as Display P3, in which sRGB's red
(255, 0, 0) is stored as (234, 51, 35). Viewers convert by the profile; a program that does not
trains on paler colours and pastes pixels back that no viewer shows so.

A profile that cannot be read, or is one of other colours than the image has (grey, RGB, CMYK), says
nothing: the values then count as sRGB, as in a file without profile.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# The colours that a profile describes, bytes 16 to 19 of its header -> the mode of such images.
_MODES = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}
# A profile is a few kilobytes, those of presses about a megabyte; nothing larger is parsed.
_MAX_PROFILE_BYTES = 16_000_000
_PROBE_SIDE = 9  # levels of each channel that tell whether a profile is sRGB itself


def to_srgb(image: Image.Image) -> Image.Image:
    """Returns the image with its colours in sRGB; its alpha stays as it is.

    Args:
        image: of mode L, LA, RGB, RGBA, CMYK or LAB, with the profile in `info`. Any other mode,
            and an image without a profile of use, is returned as it is.

    Returns:
        The image itself, or one of mode RGB, or RGBA where it has alpha.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return _lab_to_srgb().apply(image)
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
        return image
    has_alpha = image.mode in ("LA", "RGBA")
    mode = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
    transform = _transform(profile, mode)
    if transform is None:
        return image
    colours = transform.apply(image.convert(mode))
    if has_alpha:
        colours.putalpha(image.getchannel("A"))
    return colours


@functools.lru_cache(maxsize=64)  # a data set has few profiles, and to parse one costs milliseconds
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform of images of `mode` to sRGB; None where there is nothing to do."""
    if _MODES.get(profile[16:20]) != mode:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # As browsers and editors do: relative to white, the blacks matched.
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Returns whether a transform moves no colour by more than one level, as sRGB's own do.

    Such images then keep their very values, and cost no conversion.
    """
    if mode not in ("L", "RGB"):
        return False
    levels = np.linspace(0, 255, _PROBE_SIDE).round().astype(np.uint8)
    if mode == "L":
        probe = Image.fromarray(levels[None])
    else:
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3))
    converted = np.asarray(transform.apply(probe)).astype(int)
    return bool(np.abs(converted - np.asarray(probe.convert("RGB"))).max() <= 1)


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    """Returns the transform of CIE Lab, which TIFFs may hold and which needs no profile."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
