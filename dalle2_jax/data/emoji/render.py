"""One SVG -> pixels with alpha, and what those pixels allow: backgrounds, a mirror image."""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from PIL import Image

from dalle2_jax.data import attributes

# These thresholds were checked by eye on contact sheets of captioned images.
# An edge pixel stands out where its RGB is this far from the background's (Euclidean, 0 to 441).
_STANDS_OUT = 90.0
_MIN_EDGE_SHARE = 0.6
_MIN_CLEAR_SHARE = 0.15
# Mirroring changes a drawing if this share of its pixels changes by more than this (of 255).
_MIN_CHANGED_SHARE = 0.08
_CHANGED = 64
_SAME_RMS = 8.0


def render(svg: str, size: int) -> np.ndarray:
    """Renders a square SVG document: RGBA uint8 [size, size, 4], alpha not multiplied in."""
    # No system fonts: text that a set has not converted to paths would differ by machine.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def visible_backgrounds(drawing: np.ndarray) -> list[str]:
    """Returns the named colours on which a drawing [h, w, 4] stands out.

    At least 15 % of the image must be clear, so that the background is seen at all; and 60 % of the
    drawing's edge must differ from it, or a yellow face on yellow would have no outline.
    """
    # Pixels more opaque than not are the drawing. Soft shadows around it do not count as its edge.
    solid = drawing[..., 3] >= 128
    if np.mean(~solid) < _MIN_CLEAR_SHARE:
        return []
    # A pixel is on the edge if one of its four neighbours is clear; so is the image's border.
    padded = np.pad(solid, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge = drawing[solid & ~surrounded][:, :3].astype(np.float64)
    if not len(edge):
        return []
    names = []
    for name in attributes.NAMED:
        distances = np.linalg.norm(edge - attributes.COLORS[name], axis=1)
        if np.mean(distances > _STANDS_OUT) >= _MIN_EDGE_SHARE:
            names.append(name)
    return names


def changes_in_mirror(drawing: np.ndarray) -> bool:
    """Whether a drawing [h, w, 4] differs visibly from its mirror image."""
    on_white = attributes.paint(drawing, attributes.WHITE).astype(np.int16)
    # Highlights make most round things a little asymmetric: a change that is small in value or in
    # area does not count.
    difference = np.abs(on_white - on_white[:, ::-1]).max(axis=-1)
    solid = (drawing[..., 3] >= 128) | (drawing[:, ::-1, 3] >= 128)
    return bool(np.sum(difference > _CHANGED) >= _MIN_CHANGED_SHARE * max(1, np.sum(solid)))


def fingerprints(drawings: np.ndarray) -> np.ndarray:
    """Reduces drawings on white: RGBA uint8 [n, 64, 64, 4] -> float32 [n, 32, 32, 3]."""
    on_white = attributes.paint(drawings, attributes.WHITE).astype(np.float32)
    n, height, width, channels = on_white.shape
    return on_white.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def near_duplicates(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Which fingerprints show next to the same, or the same in a mirror.

    Sets draw a man, a woman and a person with a few pixels' difference, or one sign in a mirror.
    Images count as the same below a root mean square difference of 8 of 255.

    Args:
      queries: float32 [n, h, w, 3].
      references: float32 [m, h, w, 3].

    Returns:
      bool [n, m].
    """
    n, m = len(queries), len(references)
    flat = references.reshape(m, -1)
    squares = np.sum(flat**2, axis=1)
    near = np.zeros((n, m), bool)
    for images in (queries, queries[:, :, ::-1]):
        rows = images.reshape(n, -1)
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, over all pairs by one matrix product
        distances = np.sum(rows**2, axis=1)[:, None] + squares - 2 * rows @ flat.T
        near |= distances < _SAME_RMS**2 * flat.shape[1]
    return near
