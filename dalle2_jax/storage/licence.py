"""The licence of weights: a file in the model folder, which stays with whatever is made from them.

Training that starts from weights, importing and exporting pass their licence on. A model folder may
hold several, if its stages come from several sources; each is shown to the user once.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.storage import cache, paths
from dalle2_jax.storage.atomic import replacing

NAME = "LICENSE.txt"
OPENRAIL_M = Path(__file__).parent.parent / "assets" / "creativeml_openrail_m.txt"
_SEPARATOR = "\n" + "=" * 100 + "\n\n"


def read(folder: Path) -> str:
    """Returns the licences of a model folder, one after the other; "" if it has none.

    Raises UserError if the file cannot be read.
    """
    path = folder / NAME
    try:
        with paths.as_user_error("cannot read", path):
            return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def add(text: str, folder: Path) -> None:
    """Adds a licence, or several as `read` returns them, to those of a model folder.

    One that is there already is not written again. Raises UserError for a folder that cannot be
    written.
    """
    before = read(folder)
    # A dict keeps the order and drops repeats.
    after = _SEPARATOR.join(dict.fromkeys(_split(before) + _split(text)))
    if after == before:
        return
    path = folder / NAME
    try:
        with paths.as_user_error("cannot write", path), replacing(path) as temporary:
            temporary.write_text(after, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def show_once(folder: Path) -> None:
    """Prints the titles and use restrictions of a model folder's licences to stderr.

    A licence that this user has been shown before, with any weights, is not shown again.
    """
    for text in _split(read(folder)):
        shown = cache.folder() / "licences" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if shown.exists():
            continue
        print(_summary(text, folder), file=sys.stderr)
        try:
            shown.parent.mkdir(parents=True, exist_ok=True)
            shown.touch()
        except OSError:  # it will be shown again
            continue


def _split(text: str) -> list[str]:
    """Returns the licences that a file holds."""
    return [part for part in text.split(_SEPARATOR) if part]


def _summary(text: str, folder: Path) -> str:
    """Returns a licence's title and, if it restricts use in an attachment, that attachment."""
    # The first line that is not a copyright notice names the licence, in those we have met.
    lines = [line for line in text.splitlines() if line.strip()]
    title = next((line for line in lines if "(c)" not in line.lower()), "one without a name")
    _, attachment, restrictions = text.partition("\nAttachment A")  # as the RAIL licences have it
    message = (
        f"The weights in {folder} are under this licence, which stays with everything that is made "
        f"from them: {title.strip()}. Its text is in {NAME} there."
    )
    return message + (restrictions.rstrip() if attachment else "")
