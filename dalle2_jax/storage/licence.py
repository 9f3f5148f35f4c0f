"""The licence of weights: it stays with them wherever they go, and is shown once."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import replacing

NAME = "LICENSE.txt"
OPENRAIL_M = Path(__file__).parent.parent / "assets" / "creativeml_openrail_m.txt"
_BETWEEN = "\n" + "=" * 100 + "\n\n"


def read(folder: Path) -> str:
    """Returns the text of a model folder's licences; "" if it has none."""
    path = folder / NAME
    try:
        with paths.as_user_error("cannot read", path):
            return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def keep(text: str, folder: Path) -> None:
    """Writes a licence, or several as `read` gives them, into a model folder, after those that
    stand there; none twice.

    Raises UserError for a folder that cannot be written.
    """
    before = read(folder)
    after = _BETWEEN.join(dict.fromkeys(_each(before) + _each(text)))
    if after == before:
        return
    path = folder / NAME
    try:
        with paths.as_user_error("cannot write", path), replacing(path) as temporary:
            temporary.write_text(after, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def show_once(folder: Path) -> None:
    """Tells the user on stderr under what licences a model folder's weights are, and for what they
    may not be used; not again for the same licence."""
    for text in _each(read(folder)):
        _show_once(text, folder)


def _each(text: str) -> list[str]:
    """The licences that a file holds, one after the other."""
    return [part for part in text.split(_BETWEEN) if part]


def _show_once(text: str, folder: Path) -> None:
    shown = paths.cache() / "licences" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if shown.exists():
        return
    lines = [line for line in text.splitlines() if line.strip()]
    title = next((line for line in lines if "(c)" not in line.lower()), "one without a name")
    told = f"The weights in {folder} come under this licence, which stays with all that is made"
    told += f" from them: {title.strip()}. Its text is there in {NAME}."
    _, attached, restrictions = text.partition("\nAttachment A")
    print(told + (restrictions.rstrip() if attached else ""), file=sys.stderr)
    try:
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.touch()
    except OSError:  # it is shown again, then
        return
