"""Locks and logs of a workdir that has none: a bucket, and some file systems of clusters."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from absl import logging

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths
from dalle2_jax.storage.atomic import replacing

BEAT_SECONDS = 20.0
_BEATS = 4  # an owner that was not heard for so long is dead
_LAST_BEAT = 20.0  # seconds that its writing may take: the lock is given back after it
_PART_BYTES = 1 << 16


class HeartbeatLock:
    """A file that names who trains in a workdir, written anew every BEAT_SECONDS.

    It serves where there is no lock of a kernel: in a bucket, and on a local path whose file system
    has no `flock`. On a local path it is created exclusively, so of two runs that start at once
    only one gets it.

    It holds a counter and no time, so that clocks need not agree: a lock that was left behind, as
    by a machine that was taken away, is watched for _BEATS beats and then taken over. In a
    bucket two runs that start within a second may both see no lock; then the one that wrote first
    notices and stops.
    """

    def __init__(self, path: Path):
        """Raises UserError where another run holds it; waits where that run may be dead."""
        self._path, self._stopped = path, threading.Event()
        self._me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        self._me["run"] = uuid.uuid4().hex
        with paths.as_user_error("cannot write", path):
            self._wait_for_the_dead()
            self._create()
            time.sleep(min(1.0, BEAT_SECONDS / 10))  # one that began in the same moment shows now
            owner = self._read()
        if owner and owner["run"] != self._me["run"]:
            raise self._taken(owner)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(_LAST_BEAT)
        with contextlib.suppress(Exception):  # one that stays is watched and taken over
            if (self._read() or self._me)["run"] == self._me["run"]:
                self._path.unlink(missing_ok=True)

    def _wait_for_the_dead(self) -> None:
        first = self._read()
        if first is None or self._died_here(first):
            return
        logging.warning(
            "%s: was %s (process %s on %s) killed? If it shows no life within %d seconds, this run "
            "takes over",
            *(self._path, "a run", first["pid"], first["host"], _BEATS * BEAT_SECONDS),
        )
        deadline = time.monotonic() + _BEATS * BEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            now = self._read()
            if now is None:
                return
            if now != first:
                raise self._taken(now)

    def _create(self) -> None:
        """Writes the first beat; raises UserError if another run did so in this moment."""
        if paths.is_remote(self._path):
            # A bucket's path has no "write if absent": write, wait, and see who was last.
            self._write(0)
            return
        self._path.unlink(missing_ok=True)  # of a dead run
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({**self._me, "beat": 0}))
        except FileExistsError:
            raise self._taken(self._read() or {"pid": "unknown", "host": "another host"}) from None

    def _died_here(self, owner: dict[str, Any]) -> bool:
        """Returns whether the process was one of this machine that no longer runs."""
        if owner["host"] != self._me["host"]:
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's
            return False
        # Our own number: of a former run in this process, or in a container that began anew.
        return int(owner["pid"]) == os.getpid()

    def _give_way(self, owner: dict[str, Any]) -> None:
        """Ends this process at once: two runs would spoil each other's checkpoints."""
        print(f"{self._taken(owner)}: it took over from this one", file=sys.stderr, flush=True)
        os._exit(2)  # from this thread sys.exit would end the thread alone

    def _taken(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"another run (process {owner['pid']} on {owner['host']}) is training in "
            f"{self._path.parent}: wait for it, or choose another --workdir"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            return {name: owner[name] for name in ("host", "pid", "run", "beat")}
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError):  # not one of ours
            return None

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._me, "beat": beat})
        if paths.is_remote(self._path):
            self._path.write_text(text, encoding="utf-8")
            return
        with replacing(self._path) as temporary:  # nobody reads half a beat
            temporary.write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                owner = self._read()
                if self._stopped.is_set():  # meanwhile: the lock may be another's by right
                    return
                if owner and owner["run"] != self._me["run"]:
                    self._give_way(owner)
                self._write(beat := beat + 1)
            except Exception as error:  # the network is away for a while
                logging.warning("cannot write %s: %s", self._path, paths.reason(error))


class BucketLines:
    """Lines of text after those of `path`, in objects of their own: metrics.0001.jsonl and so on.

    Each is written anew with every flush, up to _PART_BYTES. `read` gives the lines of all.
    """

    def __init__(self, path: Path):
        self.name, self._path = str(path), path
        self._part, self._text = len(_parts(path)) + 1, ""

    @staticmethod
    def read(path: Path) -> list[bytes]:
        """Returns the lines of `path` and its parts, each once."""
        files = [path] if path.exists() else []
        lines = [line for file in files + _parts(path) for line in file.read_bytes().splitlines()]
        return list(dict.fromkeys(lines))  # a start that was killed may have left some twice

    @staticmethod
    def replace(path: Path, content: bytes) -> None:
        """Makes `content` all that there is."""
        # In this order: a kill in between leaves lines twice, which `read` mends, but loses none.
        path.write_bytes(content)
        for part in _parts(path):
            part.unlink()

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        with paths.as_user_error("cannot write", self._path):
            part = self._path.with_name(f"{self._path.stem}.{self._part:04d}{self._path.suffix}")
            part.write_text(self._text, encoding="utf-8")
        if len(self._text) > _PART_BYTES:
            self._part, self._text = self._part + 1, ""

    def close(self) -> None:
        """Does nothing, as all was flushed."""


def _parts(path: Path) -> list[Path]:
    if not path.parent.is_dir():
        return []
    pattern = f"{path.stem}.[0-9][0-9][0-9][0-9]{path.suffix}"  # four digits sort as text
    return sorted(path.parent.glob(pattern), key=str)
