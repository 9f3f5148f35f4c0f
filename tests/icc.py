"""Colour profiles, written byte by byte (ICC.1:2001, version 2): Display P3, grey, and a press."""

import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

# The primaries of Display P3 and the white, in XYZ adapted to D50.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
D50 = (0.9642, 1.0, 0.8249)


def display_p3() -> bytes:
    """A matrix profile with P3's primaries and sRGB's curve."""
    tags = {f"{name}XYZ": _xyz(*values) for name, values in zip("rgb", P3, strict=True)}
    return _profile("RGB ", "XYZ ", tags | {f"{name}TRC": _curve(_srgb_curve) for name in "rgb"})


def linear_grey() -> bytes:
    """A profile of grey whose values are proportional to light."""
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(lambda x: x)})


def press(inks: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A profile of CMYK whose 16 corners have colours of one's own.

    Args:
        inks: (c, m, y, k), each 0 or 1 -> sRGB uint8 [3].
    """
    corners = np.array([inks(np.array(c)) for c in np.ndindex(2, 2, 2, 2)], np.uint8)
    lab = ImageCms.applyTransform(
        Image.fromarray(corners[None]),
        ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        ),
    )
    # Pillow's a and b are signed bytes around 0, the profile's are around 128.
    table = np.frombuffer(lab.tobytes(), np.uint8).reshape(16, 3) ^ np.array(
        [0, 128, 128], np.uint8
    )
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix
    return _profile("CMYK", "Lab ", {"A2B0": head + 4 * identity + table.tobytes() + 3 * identity})


def _srgb_curve(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(function: Callable[[np.ndarray], np.ndarray], points: int = 4096) -> bytes:
    values = np.round(65535 * function(np.linspace(0, 1, points))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", points) + values.tobytes()


def _text(kind: bytes, text: bytes) -> bytes:
    if kind == b"text":
        return b"text" + bytes(4) + text + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 8 + 3 + 67)


def _profile(colours: str, space: str, tags: dict[str, bytes]) -> bytes:
    tags = {
        "desc": _text(b"desc", b"test"),
        "cprt": _text(b"text", b"none"),
        "wtpt": _xyz(*D50),
        **tags,
    }
    position, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        entries += struct.pack(">4sII", name.encode(), position + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if colours == "CMYK" else b"mntr"
    version = struct.pack(">I", 0x02400000)
    header = bytes(4) + b"test" + version + kind + colours.encode() + space.encode()
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(value * 65536) for value in D50)) + bytes(48)
    whole = header + struct.pack(">I", len(tags)) + entries + body
    return struct.pack(">I", len(whole)) + whole[4:]
