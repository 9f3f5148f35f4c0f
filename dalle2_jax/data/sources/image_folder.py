"""A folder of images with captions: `cat.png` beside `cat.txt`, or one table for all.

The table is `metadata.jsonl` (lines such as {"file_name": "a.png", "text": "a cat"}) or
`captions.csv` (columns file_name, text). In a `.txt` every line is one caption. All are UTF-8, with
or without a byte order mark. Without a table, inner folders and links to folders are read too,
except hidden ones.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from dalle2_jax.data.examples import Examples
from dalle2_jax.errors import UserError
from dalle2_jax.imaging.decode import SUFFIXES
from dalle2_jax.storage import cache, paths

TABLES = ("metadata.jsonl", "captions.csv")
# Reads UTF-8 with or without the byte order mark that editors on Windows write.
_ENCODING = "utf-8-sig"


def open_folder(path: str | os.PathLike[str], split: str = "train", held_out: str = "") -> Examples:
    """Lists the images of a folder with their captions, sorted by path, and logs how many.

    Args:
      path: the folder. One in a bucket is first copied to this machine, except for files that were
        copied before.
      split: the images below `path/split` are read if there is such a folder, else, for "train",
        those below `path`.
      held_out: a split whose folder belongs to no other split.

    Raises:
      UserError: the folder is missing or holds no images, an image lacks its caption, a folder or
        a file of captions cannot be read or is not UTF-8, a link leads nowhere, or a table is
        malformed, has no rows or names a file that does not exist.
    """
    path = paths.to_path(path)
    if paths.is_remote(path):
        path = cache.local_copy(path)
    if not os.path.isdir(path):  # False, where pathlib's raises, for a name that is too long
        raise UserError(f"{path}: no such folder")
    # Compared after resolving links, since a folder may also be reached by one from elsewhere.
    held_out_folder = (path / held_out).resolve()
    if os.path.isdir(path / split):
        path = path / split
    elif split != "train":
        cure = (
            "--config.data.eval_split= trains without evaluation"
            if split == held_out
            else "set --config.data.split=train"
        )
        raise UserError(
            f"{path}: no folder {split!r} in it for the split {split!r}; make one, or {cure}"
        )
    table = next((path / name for name in TABLES if os.path.isfile(path / name)), None)
    captions = _beside(path) if table is None else _from_table(table)
    if held_out and split != held_out:
        captions = {p: c for p, c in captions.items() if held_out_folder not in p.resolve().parents}
    if not captions:
        raise UserError(f"{path}: no images in it; known endings: {' '.join(SUFFIXES)}")
    images = sorted(captions)
    logging.info("%d images below %s", len(images), path)
    return Examples(str(path), images, [captions[image] for image in images])


def _read(path: pathlib.Path, newline: str | None = None) -> str:
    """Reads the text of a file; `newline` is as in `open`."""
    try:
        with path.open(encoding=_ENCODING, newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as e:
        line = len(e.object[: e.start + 1].splitlines())
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte {e.object[e.start]:#04x}): save it as UTF-8"
        ) from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _image_files(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the image files below a folder; each folder once, however many links lead to it."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(path, onerror=_raise_unreadable, followlinks=True):
        # Links are followed, so a folder may be reached twice, or lead back to one above it.
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk descends into what is left in this list.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (pathlib.Path(folder, name) for name in files if not name.startswith(".")):
            is_image = file.suffix.lower() in SUFFIXES
            # A broken link without a suffix may have led to a folder of images.
            is_expected = is_image or not file.suffix
            if is_expected and file.is_symlink() and not file.exists():
                raise UserError(f"{file}: a link that leads nowhere")
            if is_image:
                yield file


def _beside(path: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    """Reads captions from a `.txt` beside each image: image -> captions."""
    captions: dict[pathlib.Path, list[str]] = {}
    for image in _image_files(path):
        text = image.with_suffix(".txt")
        lines = _read(text).split("\n") if text.is_file() else []
        captions[image] = [line.strip() for line in lines if line.strip()]
    without = [image for image, lines in captions.items() if not lines]
    if without:
        first = min(without)
        raise UserError(
            f"{first}: no caption ({len(without)} of {len(captions)} images lack one); write it to "
            f"{first.with_suffix('.txt').name} beside it, or list all in {path / TABLES[0]}"
        )
    return captions


def _from_table(table: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    """Reads captions from metadata.jsonl or captions.csv: image -> captions."""
    captions: dict[pathlib.Path, list[str]] = {}
    rows = _jsonl(table) if table.suffix == ".jsonl" else _csv(table)
    root = os.path.abspath(table.parent)
    for where, row in rows:
        name, text = row.get("file_name"), row.get("text")
        values = text if isinstance(text, list) else [text]
        texts = [t.strip() for t in values if isinstance(t, str) and t.strip()]
        if not isinstance(name, str) or not texts:
            raise UserError(f"{where}: needs a file_name and a text that is not empty")
        image = table.parent / name
        if not os.path.isfile(image):  # False, too, for a name that no file can have (a NUL)
            raise UserError(f"{where}: there is no file {str(image)!r}")
        # By text, not by resolved links: the folder may hold links, but no row may name ../ files.
        if not pathlib.Path(os.path.abspath(image)).is_relative_to(root):
            raise UserError(f"{where}: {name!r} is outside of {table.parent}")
        captions.setdefault(image, []).extend(texts)
    if not captions:
        raise UserError(
            f"{table}: no rows in it; write one for each image, or remove it to read a .txt beside "
            "each"
        )
    return captions


def _jsonl(table: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, row)."""
    for number, line in enumerate(_read(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # numbers too long, brackets too deep
            raise UserError(f"{table}, line {number}: not JSON ({getattr(e, 'msg', e)})") from e
        if not isinstance(row, dict):
            raise UserError(f"{table}, line {number}: not a JSON object")
        yield f"{table}, line {number}", row


def _csv(table: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, row)."""
    lines = io.StringIO(_read(table, newline=""), newline="")
    # newline="" leaves line ends inside of quotes to the csv module.
    reader = csv.DictReader(lines, strict=True)  # else a lone quote swallows the lines after it
    try:
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise UserError(f"{table}: the first line must name the columns file_name and text")
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if None in row:
                raise UserError(
                    f"{where}: more columns than the first line names: put the text in quotes"
                )
            yield where, row
    except csv.Error as e:  # line_num is still that of the row before
        raise UserError(
            f"{table}, line {reader.line_num + 1}: not CSV ({e}): close every quote that is "
            'open, and write " inside of quotes as ""'
        ) from e
