"""Recovery from bad gradients: skipped, and after too many in a row, back to a good checkpoint.

A step whose gradient is not finite, or too large, changes nothing but counters (`step`).
`max_skips` of them in a row mean that the parameters are in a bad place: the run goes back to the
newest checkpoint that was saved after a good step, and leaves out every batch from there to the
last bad one, as PaLM did (arXiv:2204.02311, section 5.1). A line in metrics.jsonl records it:

  {"step": 8, "event": "rollback", "from": 20, "to": 8, "skipped_batches": [8, 20]}

Batches 8 to 19 (counted from 0) were tried and given up, and step 9 is trained on batch 20.
Everything is decided by numbers that all hosts have, and by nothing but the state and the data: a
run that is killed and resumed decides alike (one that was stopped after a good step has one
checkpoint more).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from dalle2_jax.errors import UserError
from dalle2_jax.train.checkpoint import Checkpoints
from dalle2_jax.train.state import TrainState
from dalle2_jax.types import Metrics

MAX_RETURNS = 3  # rollbacks in succession, with no good checkpoint saved between them


class Diverged(RuntimeError):
    """Training no longer gives usable gradients."""


class Recovery:
    """Watches the steps' metrics, and restores the last good state when too many were bad."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        template: TrainState,
        fresh: Callable[[], TrainState],
        max_skips: int,
        lag: int,
    ):
        """Starts to watch a run.

        Args:
            fresh: makes the state of step 0.
            max_skips: bad steps in a row after which the run goes back.
            lag: steps after which metrics are read, so that the host need not wait for the devices.
        """
        self._checkpoints, self._template, self._fresh = checkpoints, template, fresh
        self._max_skips, self._lag = max_skips, lag
        self._returns = 0
        self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
        # The host's own copies of the state's counters, as of the last metrics that were read.
        self._in_a_row, self._passed_over = 0, 0
        self._bad_numbers = ""  # of the newest bad step, for the message of Diverged

    def start(self) -> TrainState:
        """Returns the state to resume from: of the newest checkpoint, or of step 0."""
        return self._follow(self._checkpoints.restore_latest(self._template) or self._fresh())

    def _follow(self, state: TrainState) -> TrainState:
        # Unread metrics are those of steps on the path that was given up.
        self._unread.clear()
        self._in_a_row = int(state.faults.in_a_row)
        self._passed_over = int(state.faults.passed_over)
        return state

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step, which are read later."""
        self._unread.append((step, metrics))

    def bad_end(self, read_all: bool = False) -> int | None:
        """Returns the step after which the run must go back, or None.

        That is the `max_skips`-th bad one in a row, or one whose update, though its gradient was
        good, broke the parameters: none of these states may be saved.
        """
        while len(self._unread) > (0 if read_all else self._lag):
            step, metrics = self._unread.popleft()
            skipped = float(metrics["skipped"])  # waits for the device, if it is still at that step
            broken = not math.isfinite(float(metrics["param_norm"]))
            self._in_a_row = self._in_a_row + 1 if skipped else 0
            if skipped or broken:
                names = ("loss", "grad_norm", "param_norm")
                numbers = ", ".join(f"{name} {float(metrics[name]):.3g}" for name in names)
                self._bad_numbers = numbers
                how = "breaks the parameters" if broken else "is not applied"
                logging.warning("step %d %s: %s", step, how, numbers)
            if broken or self._in_a_row >= self._max_skips:
                return step
        return None

    def save(self, state: TrainState, scores: dict[str, float], must: bool) -> None:
        """Saves after a good step, or if it `must`: a run never goes back to another."""
        if self._in_a_row and not must:
            return
        self._checkpoints.save(state, scores)
        if not self._in_a_row:
            self._returns = 0

    def go_back(self, state: TrainState, at: int) -> tuple[TrainState, dict[str, Any]]:
        """Returns (the last good state, positioned after step `at`, the event to log).

        `state` is deleted first, as there may be no room for two. Raises Diverged after MAX_RETURNS
        in vain.
        """
        # Position of the first batch after step `at`: `TrainState.position` of that step, which is
        # no longer at hand, as the devices may be `lag` steps further.
        end = at + self._passed_over
        if self._returns == MAX_RETURNS:
            raise Diverged(
                f"{self._bad_numbers} at step {at}: no good gradients, and {MAX_RETURNS} returns "
                "to the last good checkpoint did not help. It is kept; lower "
                "optimizer.learning_rate or set optimizer.clip_norm and run the command again"
            )
        self._returns += 1
        jax.tree.map(lambda x: x.delete(), state)
        state = self._checkpoints.restore_latest(self._template, good=True) or self._fresh()
        to, begin = int(state.step), int(state.position)
        # A resumed run takes the newest checkpoint, which must not be one of the path given up.
        self._checkpoints.remove_after(to)
        # The position becomes `end`, with which the next step begins. Arithmetic on the devices:
        # with several hosts the number stays one global array.
        faults = state.faults.replace(passed_over=state.faults.passed_over + (end - begin))
        event = {"event": "rollback", "from": at, "to": to, "skipped_batches": [begin, end]}
        logging.error("BACK from step %d to %d: batches %d to %d are left out", at, to, begin, end)
        return self._follow(state.replace(faults=faults)), event


def keep(checkpoints: Checkpoints, state: TrainState, scores: dict, start: int) -> str:
    """Saves `state` if the run fails on the way; returns what to add to the error message."""
    if checkpoints.failed or jax.process_count() > 1:  # saving needs all hosts, and they train on
        return ""
    try:
        step = int(state.step)
        if step == start:
            return ""
        checkpoints.save(state, scores)
        checkpoints.wait()
    except (UserError, OSError, RuntimeError):  # RuntimeError: the state was just deleted
        return ""
    return f" (step {step} is saved: mend that and run the same command again to go on)"
