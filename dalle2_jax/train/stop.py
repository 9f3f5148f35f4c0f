"""Ends of a run: its last step, a signal or the clock; and a watchdog for hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from dalle2_jax.train.state import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OTHER_WORK = 3600.0  # seconds that anything but a step may take where the watchdog is on


class Result(NamedTuple):
    step: int
    stopped_by: str | None  # None: num_steps reached; else SIGTERM, SIGINT or max_minutes
    state: TrainState

    @property
    def exit_status(self) -> int:
        """0 at the end, and by SIGTERM with everything saved: what sent it knows that the run is
        not done, and a scheduler must not take a preemption for a failure.

        130 by SIGINT, as shells count it; 75 ("try again", sysexits.h) out of `max_minutes`.
        """
        others = {"SIGINT": 128 + signal.SIGINT, "max_minutes": os.EX_TEMPFAIL}
        return others.get(self.stopped_by or "", 0)


class Stopper:
    """Says between two steps whether to stop, the same on every host.

    One process: its own handler of SIGTERM and SIGINT. Several: the preemption service of
    `jax.distributed` agrees on the step, process 0 keeps the clock. A second signal acts at once.
    """

    def __init__(self, max_minutes: float = 0.0, watchdog_seconds: float = 0.0):
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes > 0 else None
        self._watchdog = watchdog_seconds
        self._signal: str | None = None
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        single = jax.process_count() == 1
        if single and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        elif threading.current_thread() is threading.main_thread():
            # The preemption service hears SIGTERM alone.
            interrupt = signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
            self._previous[signal.SIGINT] = interrupt
        # After the handlers are set: it makes the present one a handler for one signal only.
        _only_once(signal.SIGTERM)
        self.busy()  # restoring a checkpoint and compiling come next
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # After a failure jax.distributed waits at exit for hosts that may hang: watched till then.
        if kind is None or jax.process_count() == 1:
            faulthandler.cancel_dump_traceback_later()
        else:
            self.alive()

    def _handle(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number).name
        for each in SIGNALS:  # the next one ends the process: nothing is said to be saved
            signal.signal(each, signal.SIG_DFL)

    def alive(self) -> None:
        """Restarts the watchdog; called every step.

        Without it for `watchdog_seconds` the process prints its stacks and exits, since a host that
        hangs would hold all others for ever.
        """
        self._watch(self._watchdog)

    def busy(self) -> None:
        """Allows other work (compiling, reading, writing) `OTHER_WORK` seconds.

        Or `watchdog_seconds`, if that is longer. After that the watchdog acts.
        """
        self._watch(max(self._watchdog, OTHER_WORK))

    def _watch(self, seconds: float) -> None:
        if self._watchdog > 0 and sys.__stderr__:
            # Process 0 last: without it jax.distributed ends the others before they print anything.
            seconds *= 1.0 if jax.process_index() == 0 else 0.9
            # what Python was started with: a notebook's own stderr is no file
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def reason(self) -> str | None:
        """Returns `SIGTERM`, `SIGINT` or `max_minutes` if the run is to end now, else None."""
        self._calls += 1  # hosts count alike; steps do not always go up (recovery.py)
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if jax.process_count() == 1:
            return self._signal or ("max_minutes" if late else None)
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(self._calls):
            return "SIGTERM"
        # Seldom: a broadcast makes every host wait for the slowest.
        look = self._deadline is not None and self._calls % 10 == 0
        if look and multihost_utils.broadcast_one_to_all(np.array(late)):
            return "max_minutes"
        return None


def _only_once(number: int) -> None:
    """Makes a second signal end the process at once.

    Even if Python is stuck in a collective, or if its handler (jax.distributed's, for several
    hosts) would swallow the signal. Linux' sysv_signal installs the present handler for one signal
    only.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.sysv_signal.restype = ctypes.c_void_p
        # signal() returns the handler that it replaces: it is read by setting the default.
        handler = ctypes.c_void_p(libc.signal(number, None))
        libc.sysv_signal(number, handler)
    except (OSError, AttributeError):  # not on a Linux with glibc
        return
