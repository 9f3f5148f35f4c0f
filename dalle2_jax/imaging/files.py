"""Image files: PNGs that carry how they were generated, animations, and reading any file.

Images are uint8 [h, w, 3]. The metadata of an image are a JSON object in an iTXt chunk, so that the
file alone is enough to generate it again.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dalle2_jax.errors import UserError
from dalle2_jax.imaging.decode import DamagedImage, decode, transparent
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import replacing

CHUNK = "dalle2_jax"


def save_png(
    path: str | Path, picture: np.ndarray, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes uint8 [h, w, 3] whole or not at all, with `metadata` (plain JSON values) inside.

    The folder is created if necessary. The same image and metadata give the same bytes. Raises
    UserError if the place cannot be written to.
    """
    path = paths.to_path(path)
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [h, w, 3], not {picture.dtype} {picture.shape}")
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_itxt(CHUNK, _to_json(metadata))
    try:
        paths.make_folder(path.parent)
        with paths.as_user_error("cannot write", path), replacing(path) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_animation(
    path: str | Path, frames: Sequence[np.ndarray] | np.ndarray, milliseconds: int
) -> None:
    """Writes uint8 [h, w, 3] frames of one size as a WebP that runs there and back for ever.

    Every frame shows for `milliseconds`, those at the ends four times as long. Raises UserError as
    `save_png`.
    """
    path = paths.to_path(path)
    there = [Image.fromarray(np.asarray(frame)) for frame in frames]
    images = [*there, *there[-2:0:-1]]
    ends = (0, len(there) - 1)
    times = [milliseconds * (4 if place in ends else 1) for place in range(len(images))]
    try:
        paths.make_folder(path.parent)
        with paths.as_user_error("cannot write", path), replacing(path) as temporary:
            options: dict[str, Any] = {"duration": times, "loop": 0, "quality": 90}
            images[0].save(
                temporary, format="WEBP", save_all=True, append_images=images[1:], **options
            )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def prepare_folder(path: str | Path) -> Path:
    """Creates the folder and checks that it can be written to; raises UserError."""
    if not str(path).strip():  # pathlib takes it for the current folder
        raise UserError("the folder to write to has no name: give one, or . for the current folder")
    path = paths.to_path(path)
    if paths.is_remote(path):
        with paths.as_user_error("cannot write to the folder", path):
            (path / ".writable").write_bytes(b"")
            (path / ".writable").unlink()
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {error.strerror or error}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns the metadata that `save_png` put into a PNG; raises UserError if there are none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # a text chunk may follow the pixels
            text = getattr(image, "text", {}).get(CHUNK)
    except Image.DecompressionBombError as error:  # its limit against pictures that fill the memory
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
        raise UserError(f"{path} does not say how it was drawn: it has no {CHUNK!r} text")
    return metadata


def read(path: str | Path) -> np.ndarray:
    """Reads an image file of any mode as uint8 [h, w, 3]: upright, over white, 16 bits as 8.

    Training reads images in the same way, see `imaging.decode`. Raises UserError for a file that is
    missing, damaged, no image, or too large.
    """
    return _read(path, decode)


def read_mask(path: str | Path) -> np.ndarray:
    """Reads the pixels that a mask file marks to be regenerated, bool [h, w].

    These are the transparent pixels (alpha 0) or, if there are none, the white ones. Raises
    UserError as `read`.
    """
    erased = _read(path, transparent)
    return erased if erased.any() else read(path).mean(axis=-1) > 127.5


def read_erased(path: str | Path) -> np.ndarray:
    """Returns where the alpha of an image file is 0, bool [h, w]. Raises UserError as `read`."""
    return _read(path, transparent)


def _read(path: str | Path, decoded: Callable[[bytes], np.ndarray]) -> np.ndarray:
    path = paths.to_path(path)
    try:
        with paths.as_user_error("cannot read", path):
            return decoded(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (DamagedImage, ValueError) as error:  # or a name that no file can have
        raise UserError(f"{path}: {error}") from error


def middle_square(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> the middle [size, size, 3] after its shorter side is brought to `size`, as
    CLIP's own preprocessing does it: Pillow's bicubic filter, in whole numbers."""
    h, w = picture.shape[:2]
    shorter = min(h, w)
    width, height = (int(size * side / shorter) for side in (w, h))
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def slug(text: str, length: int = 48) -> str:
    """A prompt as part of a file's name: lower-case ASCII letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:length].strip("-") or "picture"


def _to_json(metadata: Mapping[str, Any]) -> str:
    text = json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)
    if any("\ud800" <= char <= "\udfff" for char in text):  # a prompt with half a character
        return json.dumps(dict(metadata), ensure_ascii=True, sort_keys=True)
    return text
