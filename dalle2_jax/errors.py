"""The exception for a user's mistake, and the hint that its message ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input, reported in one line that names the input and the cure.

    Entry points print the message without a traceback and exit with `exit_status`.
    """

    exit_status = 2


def near_miss(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'batch_size'?`, or the known names if none is similar."""
    known = sorted(known)
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not similar:  # Of a dotted path the last part alone may be similar.
        last = {path.rpartition(".")[2]: path for path in known}
        matches = difflib.get_close_matches(name.rpartition(".")[2], last, n=1)
        similar = [last[match] for match in matches]
    return f"; did you mean {similar[0]!r}?" if similar else f"; known: {', '.join(known)}"
