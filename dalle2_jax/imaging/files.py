"""Image files: PNGs that hold the metadata of their generation, animations, and reading any file.

Images are uint8 [h, w, 3]. The metadata are a JSON object in an iTXt chunk, so that the file alone
is enough to generate the image again. Files may be on this machine or in a bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dalle2_jax.errors import UserError
from dalle2_jax.imaging.decode import DamagedImage, decode, transparent
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import replacing

CHUNK = "dalle2_jax"
"""The keyword of the iTXt chunk that holds the metadata."""


def save_png(
    path: str | os.PathLike[str], image: np.ndarray, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG file, whole or not at all; the same arguments give the same bytes.

    Args:
        path: the file; its folder is made if it does not exist.
        image: uint8 [h, w, 3].
        metadata: plain JSON values, to be read by `read_metadata`.

    Raises:
        UserError: the file cannot be written.
        ValueError: another array.
    """
    path = paths.to_path(path)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image is uint8 [h, w, 3], not {image.dtype} {image.shape}")
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_itxt(CHUNK, _to_json(metadata))
    with _written(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunks)


def save_animation(
    path: str | os.PathLike[str], frames: Sequence[np.ndarray] | np.ndarray, milliseconds: int
) -> None:
    """Writes a WebP that plays frames forwards and backwards, endlessly; whole or not at all.

    Args:
        path: the file; its folder is made if it does not exist.
        frames: uint8 [h, w, 3] each, of one size.
        milliseconds: how long a frame is shown; the first and the last, four times as long.

    Raises:
        UserError: the file cannot be written.
    """
    forwards = [Image.fromarray(np.asarray(frame)) for frame in frames]
    images = [*forwards, *forwards[-2:0:-1]]  # the ends once each
    ends = (0, len(forwards) - 1)
    durations = [milliseconds * (4 if i in ends else 1) for i in range(len(images))]
    with _written(paths.to_path(path)) as temporary:
        images[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=images[1:],
            duration=durations,
            loop=0,
            quality=90,
        )


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Yields a temporary file that becomes `path`, see `replacing`; raises UserError."""
    try:
        paths.make_folder(path.parent)
        with paths.as_user_error("cannot write", path), replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata that `save_png` wrote into a PNG; raises UserError if there are none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # a text chunk may follow the pixels
            text = getattr(image, "text", {}).get(CHUNK)
    except Image.DecompressionBombError as error:  # Pillow's limit against filling the memory
        raise UserError(f"{path} is larger than Pillow reads: {error}") from error
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a PNG, or a damaged one") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        metadata = json.loads(text or "")
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} does not say how it was generated: it has no {CHUNK!r} text")
    return metadata


def read(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file of any mode as uint8 [h, w, 3]: upright, over white, 16 bits as 8.

    Training reads images in the same way, see `imaging.decode`.

    Raises:
        UserError: the file is missing, damaged, no image, or too large.
    """
    return _read(path, decode)


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a mask file as an `edit_mask`, bool [h, w], True where pixels are to be regenerated.

    These are its transparent pixels (alpha 0) or, if it has none, its white ones. Raises UserError
    as `read` does.
    """
    edit_mask = read_transparent(path)
    return edit_mask if edit_mask.any() else read(path).mean(axis=-1) > 127.5


def read_transparent(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns where the alpha of an image file is 0, bool [h, w]. Raises UserError as `read`."""
    return _read(path, transparent)


def _read(path: str | os.PathLike[str], decoder: Callable[[bytes], np.ndarray]) -> np.ndarray:
    path = paths.to_path(path)
    try:
        with paths.as_user_error("cannot read", path):
            return decoder(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (DamagedImage, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: {error}") from error


def slug(text: str, length: int = 48) -> str:
    """Returns a prompt as part of a file name: lower-case ASCII letters, digits and dashes."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text)[:length].strip("-") or "image"


def _to_json(metadata: Mapping[str, Any]) -> str:
    text = json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)
    if any("\ud800" <= char <= "\udfff" for char in text):  # half a character: UTF-8 has none
        return json.dumps(dict(metadata), ensure_ascii=True, sort_keys=True)
    return text
