"""A trace of a few steps for TensorBoard: WORKDIR/plugins/profile/RUN/HOST.xplane.pb."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging

from dalle2_jax.storage import paths

FIRST, LAST = 3, 5  # steps after the start: the first one compiles, the second may do so again


class Profile:
    """Records steps FIRST to LAST of a run, on process 0: all hosts run the same program."""

    def __init__(self, on: bool, workdir: Path, start_step: int):
        self._folder, self._start = workdir, start_step
        self._written = str(workdir)  # into a bucket the files are copied when they are all there
        self._wanted, self._running = on and jax.process_index() == 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()  # a run that ends sooner
        if self._wanted:
            logging.warning("no profile: the run ended before its step %d", self._start + FIRST)

    def __call__(self, step: int, metrics: Any) -> None:
        """Starts or stops the trace after a step; `metrics` are the step's."""
        if self._wanted and step == self._start + FIRST - 1:
            jax.block_until_ready(metrics)  # the steps before are not in the trace
            self._wanted, self._running = False, True
            if paths.is_remote(self._folder):
                self._written = tempfile.mkdtemp()
            try:
                jax.profiler.start_trace(self._written)
            except Exception as error:  # another profile is running
                self._running = False
                _warn(error)
        elif self._running and step == self._start + LAST:
            jax.block_until_ready(metrics)  # dispatch is asynchronous: these steps still run
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            if paths.is_remote(self._folder):
                self._upload()
        except Exception as error:  # a full disk; the profiler raises as it pleases
            _warn(error)
            return
        logging.info("wrote a profile: tensorboard --logdir=%s, page Profile", self._folder)

    def _upload(self) -> None:
        with tempfile.TemporaryDirectory() as outer:
            written = Path(self._written).rename(Path(outer) / "trace")  # so that it goes away
            for file in written.rglob("*"):
                if file.is_file():
                    paths.upload(file, self._folder / file.relative_to(written).as_posix())


def _warn(error: Exception) -> None:
    message = " ".join(str(error).split())[:200]
    logging.warning("the profile could not be written (%s): training goes on", message)
