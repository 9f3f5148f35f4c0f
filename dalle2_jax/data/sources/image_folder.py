"""A folder of pictures with captions: `cat.png` beside `cat.txt`, or one table for all.

The table is `metadata.jsonl` (lines such as {"file_name": "a.png", "text": "a cat"}) or
`captions.csv` (columns file_name, text). In a `.txt` every line is one caption. All are UTF-8, with
or without a byte order mark. Without a table, folders within and links to folders are read too, but
for hidden ones.
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
from dalle2_jax.storage import paths

TABLES = ("metadata.jsonl", "captions.csv")
_ENCODING = "utf-8-sig"


def open_folder(path: str | os.PathLike[str], split: str = "train", held_out: str = "") -> Examples:
    """The pictures below `path` (below `path/split` where there is such a folder), sorted by path.

    What lies below `path/held_out` belongs to no other split. A folder in a bucket is copied to
    this machine first, but for what is here already.
    How many pictures are read, and where, is logged.

    Raises:
      UserError: the folder is missing or holds no pictures, a picture lacks its caption, a folder
        or a file of captions cannot be read or is not UTF-8, a link leads nowhere, or a table is
        malformed, has no rows or names a file that is not there.
    """
    path = paths.to_path(path)
    if paths.is_remote(path):
        path = paths.local_copy(path)
    if not os.path.isdir(path):  # False, where pathlib's raises, for a name that is too long
        raise UserError(f"{path}: no such folder")
    kept_back = (path / held_out).resolve()
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
        captions = {p: c for p, c in captions.items() if kept_back not in p.resolve().parents}
    if not captions:
        raise UserError(f"{path}: no pictures in it; known endings: {' '.join(SUFFIXES)}")
    pictures = sorted(captions)
    logging.info("%d pictures below %s", len(pictures), path)
    return Examples(str(path), pictures, [captions[p] for p in pictures])


def _read(path: pathlib.Path, newline: str | None = None) -> str:
    """The text of a file; `newline` is as in `open`."""
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


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _pictures(path: pathlib.Path) -> Iterator[pathlib.Path]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(path, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # by a link, which may lead back to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (pathlib.Path(folder, name) for name in files if not name.startswith(".")):
            is_picture = file.suffix.lower() in SUFFIXES
            may_be = is_picture or not file.suffix  # a picture, or once a folder of pictures
            if may_be and file.is_symlink() and not file.exists():
                raise UserError(f"{file}: a link that leads nowhere")
            if is_picture:
                yield file


def _beside(path: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    found: dict[pathlib.Path, list[str]] = {}
    lacking = []
    for picture in _pictures(path):
        text = picture.with_suffix(".txt")
        lines = _read(text).split("\n") if text.is_file() else []
        found[picture] = [line.strip() for line in lines if line.strip()]
        if not found[picture]:
            lacking.append(picture)
    if lacking:
        first = min(lacking)
        raise UserError(
            f"{first}: no caption ({len(lacking)} of {len(found)} pictures lack one); write it to "
            f"{first.with_suffix('.txt').name} beside it, or list all in {path / TABLES[0]}"
        )
    return found


def _from_table(table: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    captions: dict[pathlib.Path, list[str]] = {}
    rows = _jsonl(table) if table.suffix == ".jsonl" else _csv(table)
    root = os.path.abspath(table.parent)
    for where, row in rows:
        name, text = row.get("file_name"), row.get("text")
        given = text if isinstance(text, list) else [text]
        texts = [t.strip() for t in given if isinstance(t, str) and t.strip()]
        if not isinstance(name, str) or not texts:
            raise UserError(f"{where}: needs a file_name and a text that is not empty")
        picture = table.parent / name
        if not os.path.isfile(picture):  # so too a name that no file can have, as with a NUL
            raise UserError(f"{where}: there is no file {str(picture)!r}")
        if not pathlib.Path(os.path.abspath(picture)).is_relative_to(root):
            raise UserError(f"{where}: {name!r} lies outside of {table.parent}")
        captions.setdefault(picture, []).extend(texts)
    if not captions:
        raise UserError(
            f"{table}: no rows in it; write one a picture, or remove it to read a .txt beside each"
        )
    return captions


def _jsonl(table: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
    lines = io.StringIO(_read(table, newline=""), newline="")
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
