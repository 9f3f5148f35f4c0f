"""The flags that compile for a TPU slice instead of running, of all commands that have them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from dalle2_jax.errors import UserError

if TYPE_CHECKING:  # mistakes in the flags are reported before jax is loaded
    from dalle2_jax.aot.report import Report

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "A TPU slice, as v5e:8x8 or v5e-64: compile for it, report memory and speed, and run nothing. "
    "Flags that only a run needs (--workdir, hosts, prompts) are ignored. `dalle2 topology` takes "
    "the slice as its first word.",
)
_GO_WITH_IT: list[flags.FlagHolder[bool]] = []


def only_with_topology(name: str, help_text: str) -> flags.FlagHolder[bool]:
    """Defines a flag that is an error unless --topology is given."""
    _GO_WITH_IT.append(flags.DEFINE_bool(name, False, f"(with a TPU slice) {help_text}"))
    return _GO_WITH_IT[-1]


JSON = only_with_topology("json", "Print one JSON object instead of the table.")
THOROUGH = only_with_topology(
    "thorough",
    "Let the compiler search for a faster program, as in a run. Takes up to ten times as long.",
)


def check() -> None:
    """Raises UserError for a flag that needs --topology; called before anything is run."""
    for flag in _GO_WITH_IT:
        if flag.value:
            raise UserError(f"--{flag.name} goes with --topology: give a slice, as in v5e:8x8")


def report(ask: Callable[..., Report], *args: Any, **kwargs: Any) -> int:
    """Prints the report that `ask` gives of its arguments and of the flags; the exit status.

    With --json, a program that does not fit is reported as JSON too.
    """
    from dalle2_jax.aot.report import TooLarge  # late: it loads jax

    for number in (signal.SIGINT, signal.SIGTERM):  # nothing is lost, and a handler in Python would
        signal.signal(number, signal.SIG_DFL)  # wait for the compiler
    try:
        report = ask(*args, topology=TOPOLOGY.value, thorough=THOROUGH.value, **kwargs)
    except TooLarge as error:
        if JSON.value:
            print(error.json())
        raise
    print(report.json() if JSON.value else report.table())
    return 0
