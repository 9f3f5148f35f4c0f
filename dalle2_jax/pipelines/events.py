"""Events of generating: progress of the stages, and batches of finished images.

Everything here that takes time is a generator of events. A caller that wants only the result runs
it to its end with `collect`; one that shows progress or intermediate images reads the events.
Closing a generator cancels the work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from dalle2_jax.pipelines import placement
from dalle2_jax.sampling.stage import Events
from dalle2_jax.types import Array

Result = TypeVar("Result")


class StageProgress(NamedTuple):
    """Progress of a stage, in sampling steps over all batches.

    Attributes:
        stage: the stage's name.
        done: steps done.
        total: steps in all.
        x_0: the stage's present prediction [b, ...] for the running batch: images in [-1, 1], or
            z_img. None before the first step, and while an image is inverted.
    """

    stage: str
    done: int
    total: int
    x_0: Array | None = None


class Batch(NamedTuple):
    """Finished images.

    Attributes:
        start: number of the first one among all images.
        images: uint8 [b, h, w, 3].
    """

    start: int
    images: np.ndarray


Event = StageProgress | Batch
Steps = Generator[StageProgress, None, Result]
"""Yields progress and returns the result."""

ProgressCallback = Callable[[str, int, int], Any]
"""Called with (stage, steps done, steps in all)."""


def run_stage(
    stage: str, steps: Events[Result], batch: int = 0, num_batches: int = 1
) -> Steps[Result]:
    """Runs a stage's sampler on batch number `batch`, counting steps over all batches.

    The mesh is visible only while the sampler computes, not while the caller holds an event: the
    caller may run another model in between. Each event waits for the devices, so that it reports
    steps that are done and not steps that are queued.
    """
    while True:
        with placement.visible(placement.mesh()):
            try:
                event = next(steps)
            except StopIteration as end:
                return jax.block_until_ready(end.value)  # JAX returns before it has computed
        jax.block_until_ready(event.x_0)
        done = batch * event.total + event.done
        yield StageProgress(stage, done, num_batches * event.total, event.x_0)


def images_of(
    events: Iterable[Event], progress: ProgressCallback | None = None
) -> Iterator[np.ndarray]:
    """Yields the images of each batch as it is done, reporting progress to the callback."""
    for event in events:
        if isinstance(event, Batch):
            yield event.images
        elif progress is not None:
            progress(event.stage, event.done, event.total)


def collect(events: Iterable[Event], progress: ProgressCallback | None = None) -> np.ndarray:
    """Returns the images of all batches, uint8 [n, h, w, 3]."""
    return np.concatenate(list(images_of(events, progress)))


def result_of(steps: Steps[Result], progress: ProgressCallback | None = None) -> Result:
    """Runs `steps` to its end and returns its result."""
    while True:
        try:
            event = next(steps)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(event.stage, event.done, event.total)
