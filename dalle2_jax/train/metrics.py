"""Reports of a run: numbers to the terminal, TensorBoard and metrics.jsonl; images.

The only module that imports clu; its writers, and with them TensorFlow, only if TensorBoard's files
are written.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from dalle2_jax.errors import UserError
from dalle2_jax.imaging.files import save_png
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import remove_stale, replacing
from dalle2_jax.train.bucket import BucketLines
from dalle2_jax.types import Metrics, Params


class Window:
    """Metrics since the last log, left on the devices until they are read.

    If nobody reads them (log_every=0) the newest `most` are kept, or up to twice as many.
    """

    def __init__(self, most: int = 1000):
        self._most = most
        self._steps: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        # Cut in half when full, so that a step costs no copy of the list.
        if len(self._steps) >= 2 * self._most:
            self._steps = self._steps[-self._most :]
        self._steps.append(metrics)

    def mean(self) -> dict[str, float]:
        """Returns averages over the window's good steps and how many were `skipped`; empties it."""
        values = jax.device_get(self._steps)  # the only place where the log waits for the devices
        self._steps = []
        # The loss of a skipped step may be NaN, which would hide all others.
        good = [v for v in values if not v["skipped"]]
        means = {k: float(np.mean([np.float64(v[k]) for v in good])) for k in (good or [{}])[0]}
        return {**means, "skipped": float(len(values) - len(good))} if values else {}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def last_saved(workdir: Path) -> int:
    """Returns the step of the newest checkpoint that metrics.jsonl mentions, or 0."""
    steps = [0]
    for line in _lines(workdir / "metrics.jsonl"):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            steps.append(int(json.loads(line)["checkpoint"]))
    return max(steps)


class Reporter:
    """Writes reports on process 0; on the others every method does nothing."""

    def __init__(self, workdir: Path, start_step: int, start_batch: int, tensorboard: bool):
        """Opens the reports of a run that resumes after `start_step`.

        Its next batch is `start_batch`.
        """
        self._active = jax.process_index() == 0
        self._folder, self._clu = workdir, None
        self._last_step, self._last_time = start_step, time.perf_counter()
        self._last_saved = 0
        if not self._active:
            return
        paths.make_folder(workdir)
        for folder in (workdir, workdir / "previews", workdir / "model"):
            remove_stale(folder, 0)  # the workdir's lock is held: nobody is writing them
        self._lines = _reopen(workdir / "metrics.jsonl", start_step, start_batch)
        self._last_saved = last_saved(workdir)  # of the lines that are left
        if tensorboard:
            from clu import metric_writers

            self._clu = metric_writers.AsyncMultiWriter(
                [
                    metric_writers.LoggingWriter(),
                    metric_writers.SummaryWriter(str(workdir)),
                ]
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            with contextlib.suppress(OSError):  # every line was flushed, or reported as lost
                self._lines.close()
            self._tensorboard("close")

    def go_back(self, step: int, batch: int, event: Mapping[str, Any]) -> None:
        """Reports as a killed run that resumes after `step`, at `batch` of the data.

        The lines of the path that was given up go away, and `event` takes their place.
        """
        self.restart_clock(step)
        if self._active:
            self._lines.close()
            self._lines = _reopen(self._folder / "metrics.jsonl", step, batch)
            self._last_saved = last_saved(self._folder)
            self._line({"step": step, **event})

    def parameters(self, params: Params) -> None:
        """Logs a table of the parameters, and their number."""
        if self._active:
            table = parameter_overview.get_parameter_overview(params, include_stats=False)
            logging.info("\n%s", table)

    def log(self, step: int, num_steps: int, batch_size: int, values: Mapping[str, float]) -> None:
        """Logs the scalars of the window that ends at `step`, with its speed and the time left."""
        now = time.perf_counter()
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self.restart_clock(step)
        speed = {"steps_per_second": rate, "images_per_second": rate * batch_size}
        self.scalars(step, {**values, **speed})
        if self._active:
            left = _duration((num_steps - step) / rate) if rate else "?"
            loss = values.get("loss", math.nan)  # no step of the window was good
            print(
                f"step {step}/{num_steps} ({100 * step / num_steps:.1f} %)  "
                f"loss {loss:.5f}  {rate:.2f} steps/s  {rate * batch_size:.1f} images/s  "
                f"{left} left",
                flush=True,
            )

    def restart_clock(self, step: int) -> None:
        """Measures speed from here on."""
        self._last_step, self._last_time = step, time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves time spent on previews, evaluation and saving out of the speed."""
        self._last_time += seconds

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars to metrics.jsonl and TensorBoard."""
        if self._active:
            self._line({"step": step, **values})
            self._tensorboard("write_scalars", step, dict(values))

    def _line(self, values: Mapping[str, Any]) -> None:
        try:
            self._lines.write(json.dumps(values) + "\n")
            self._lines.flush()  # a kill costs no line, and a full disk shows at once
        except OSError as error:
            raise UserError(f"cannot write {self._lines.name}: {error.strerror}") from error

    def saved(self, step: int | None) -> None:
        """Reports, once, that the checkpoint of `step` is complete."""
        if self._active and step and step > self._last_saved:
            self._last_saved = step
            self._line({"step": step, "checkpoint": step})

    def images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes uint8 [h, w, 3] to TensorBoard and WORKDIR/previews/step_000100_NAME.png."""
        if not self._active:
            return
        for name, image in images.items():
            image = np.asarray(image)
            file = f"step_{step:06d}_{name.replace('/', '_')}.png"
            save_png(self._folder / "previews" / file, image)
            self._tensorboard("write_images", step, {name: image[None]})

    def _tensorboard(self, method: str, *arguments: Any) -> None:
        """Calls clu's writer.

        If it fails training continues without, as metrics.jsonl has all numbers.
        """
        try:
            if self._clu:
                getattr(self._clu, method)(*arguments)
        except Exception as error:  # clu reports a full disk by an error of its own
            self._clu = None
            message = " ".join(str(error).split())[:200]
            logging.warning("TensorBoard's files are no longer written (%s)", message)


def _reopen(path: Path, start_step: int, start_batch: int) -> IO[str] | BucketLines:
    """Opens metrics.jsonl without what a killed run wrote after the checkpoint that is resumed.

    Rollbacks (`recovery`) past batches that the checkpoint still has before it are left out too.
    """
    kept = []
    for line in _lines(path):
        try:
            event = json.loads(line)
            passed = event.get("skipped_batches", (0, 0))
            if event["step"] <= start_step and passed[1] <= start_batch:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, no UTF-8, no object
            print(f"{path}: a broken line is dropped", file=sys.stderr)
    # Broken lines are what a kill in the middle of a write leaves, or a user's editor.
    if paths.is_remote(path):
        BucketLines.replace(path, b"".join(kept))
        return BucketLines(path)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _lines(path: Path) -> list[bytes]:
    if paths.is_remote(path):
        return BucketLines.read(path)
    try:
        return path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        message = (
            f"cannot read {path} ({error.strerror}): move it away, or choose another --workdir"
        )
        raise UserError(message) from error
