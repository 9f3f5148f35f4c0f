"""The exception for a user's mistake, and the hint that its message ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input, reported in one line that names the input and the cure.

    Entry points print the message without a traceback and exit with `exit_status`.
    """

    exit_status = 2


def closest(name: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that `name` is probably a misspelling of; None if none is similar."""
    choices = sorted(choices)
    for similar in difflib.get_close_matches(name, choices, n=1, cutoff=0.6):
        return similar
    # Only the last part of a dotted path may be similar.
    last_parts = {path.rpartition(".")[2]: path for path in choices}
    for similar in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1):
        return last_parts[similar]
    return None


def near_miss(name: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'batch_size'?`, or all choices if none is similar."""
    choices = sorted(choices)
    similar = closest(name, choices)
    return f"; did you mean {similar!r}?" if similar else f"; known: {', '.join(choices)}"
