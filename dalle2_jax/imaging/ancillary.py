"""Image files without what stands beside their pixels: comments, thumbnails, profiles, vendor tags.

These parts are written by cameras, editors and web sites, and are often odd or damaged. Where one
of them keeps Pillow from reading a file whose pixels are whole, the file is read without them:

    PNG    a sequence of chunks; those whose name begins with a capital letter are critical, and
           tRNS holds transparency
    JPEG   a sequence of segments up to the start of scan; APP0 (JFIF) and APP14 (Adobe, which says
           how CMYK is stored) are kept, other APPn and comments are not
    WebP   a RIFF sequence of chunks; EXIF and XMP are dropped, with their flags in VP8X

The colour profile is kept or dropped as the caller says: it is odd more seldom, and it matters.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS, _PNG_PROFILE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"), b"iCCP"
_START_OF_SCAN, _APP_0, _APP_2, _APP_14, _APP_15, _COMMENT = 0xDA, 0xE0, 0xE2, 0xEE, 0xEF, 0xFE
_JPEG_PROFILE = b"ICC_PROFILE\0"  # how an APP2 with a part of a profile begins
_WEBP_PROFILE, _WEBP_TAGS = b"ICCP", (b"EXIF", b"XMP ")
_WEBP_HAS_PROFILE, _WEBP_HAS_TAGS = 0x20, 0x08 | 0x04  # flags of VP8X


def without_ancillary(data: bytes, keep_profile: bool) -> bytes:
    """Returns the file with its pixels, and its colour profile with `keep_profile`, alone.

    Other formats, and files that end within a part, are returned as they are.
    """
    try:
        if data.startswith(_PNG):
            return _PNG + b"".join(_png_chunks(data, keep_profile))
        if data.startswith(b"\xff\xd8"):
            return _bare_jpeg(data, keep_profile)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            body = b"WEBP" + b"".join(_webp_chunks(data, keep_profile))
            return b"RIFF" + struct.pack("<I", len(body)) + body
    except (struct.error, IndexError):  # it ends within a chunk: Pillow says what it makes of it
        pass
    return data


def _png_chunks(data: bytes, keep_profile: bool) -> Iterator[bytes]:
    """Yields the chunks that hold pixels: length, name, data and checksum."""
    position = len(_PNG)
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if name in _PNG_PIXELS or (keep_profile and name == _PNG_PROFILE):
            yield data[position:end]
        if name == b"IEND":
            return
        position = end


def _bare_jpeg(data: bytes, keep_profile: bool) -> bytes:
    """Returns a JPEG without comments and its APPn segments, but APP0 and APP14."""
    kept, position = [data[:2]], 2
    while True:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if data[position] != 0xFF or marker == _START_OF_SCAN:
            # Entropy-coded pixels, and whatever follows them, to the end.
            return b"".join(kept) + data[position:]
        is_profile = marker == _APP_2 and data.startswith(_JPEG_PROFILE, position + 4)
        is_ancillary = marker == _COMMENT or (_APP_0 < marker <= _APP_15 and marker != _APP_14)
        if not is_ancillary or (keep_profile and is_profile):
            kept.append(data[position : position + 2 + length])
        position += 2 + length


def _webp_chunks(data: bytes, keep_profile: bool) -> Iterator[bytes]:
    """Yields the chunks that hold pixels; VP8X without the flags of those that are left out."""
    position, dropped, flags = 12, _WEBP_TAGS, _WEBP_HAS_TAGS
    if not keep_profile:
        dropped, flags = (*dropped, _WEBP_PROFILE), flags | _WEBP_HAS_PROFILE
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length + length % 2
        chunk = data[position:end]
        if name == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~flags]) + chunk[9:]
        if name not in dropped:
            yield chunk
        position = end
