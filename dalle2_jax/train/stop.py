"""How a run ends: at its last step, by a signal or the clock; and what watches for a hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from dalle2_jax.train.state import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Result(NamedTuple):
    step: int
    stopped_by: str | None  # None: num_steps reached; else SIGTERM, SIGINT or max_minutes
    state: TrainState

    @property
    def exit_status(self) -> int:
        """0 at the end alone: a script must not take a stop for it.

        A signal's as shells count it; 75 ("try again", sysexits.h) out of `max_minutes`.
        """
        if self.stopped_by is None:
            return 0
        number = signal.Signals.__members__.get(self.stopped_by)
        return 128 + number if number else os.EX_TEMPFAIL


class Stopper:
    """Says between two steps whether to stop, the same on every host.

    One process: its own handler of SIGTERM and SIGINT; a second signal acts at once. Several:
    the preemption service of `jax.distributed` agrees on the step, process 0 keeps the clock.
    """

    def __init__(self, max_minutes: float = 0.0, watchdog_seconds: float = 0.0):
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes > 0 else None
        self._watchdog = watchdog_seconds
        self._signal: str | None = None
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
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.rest()

    def _handle(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number).name
        signal.signal(number, self._previous[number])

    def alive(self) -> None:
        """Called every step: without it for `watchdog_seconds` the process dumps its stacks and
        exits, as a host that hangs would hold all the others for ever."""
        if self._watchdog > 0:
            faulthandler.dump_traceback_later(self._watchdog, exit=True)

    def rest(self) -> None:
        """Called before work that may take longer than a step; `alive` watches again."""
        if self._watchdog > 0:
            faulthandler.cancel_dump_traceback_later()

    def reason(self, step: int) -> str | None:
        """`SIGTERM`, `SIGINT` or `max_minutes` where the run is to end after `step`."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if jax.process_count() == 1:
            return self._signal or ("max_minutes" if late else None)
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return "SIGTERM"
        look = self._deadline is not None and step % 10 == 0
        if look and multihost_utils.broadcast_one_to_all(np.array(late)):
            return "max_minutes"
        return None
