"""Checkpoints on top of Orbax: verified before they are restored, with a fallback to older ones.

Orbax commits a checkpoint atomically, but keeps no checksum of array data and casts dtypes
silently. So `manifest` holds the sha256 of every file, compared before anything is restored;
shapes, dtypes and the identity of the weights are saved beside the arrays. A checkpoint that exists
but cannot be loaded never becomes a silent start from step 0.

With several hosts (one workdir for all) process 0 looks at the files and decides for all.

A bucket has no renaming: removing a checkpoint takes a while, and what is left of one that a killed
run was removing is set aside as damaged.
"""

from __future__ import annotations

import fcntl
import json
import logging as std_logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging
from flax import traverse_util

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import paths
from dalle2_jax.train import hosts, manifest
from dalle2_jax.train.bucket import HeartbeatLock
from dalle2_jax.train.state import TrainState
from dalle2_jax.types import PyTree

# How a network is computed, not what it is.
_MAY_CHANGE = ("remat", "dtype", "dropout")
_HEARTBEAT = ".lock.json"  # the lock where the file system has none
_REMOVED = "removed"  # Orbax moves old steps here: a kill while files go leaves no half checkpoint


def describe(state: PyTree) -> dict[str, list[Any]]:
    """Returns path -> [shape, dtype]: what a config must share with a checkpoint to resume from
    it.
    """
    return {k: [list(x.shape), str(x.dtype)] for k, x in sharding.flatten(state).items()}


class WorkdirLock:
    """Keeps a second trainer out of a workdir.

    The kernel releases it when the process dies. In a bucket, and where the file system has no
    locks, a file with a heartbeat does the same, see `bucket.HeartbeatLock`.
    """

    def __init__(self, workdir: Path):
        """Takes the lock; raises UserError if another process holds it or it cannot be written.

        Of several hosts one takes it for all, and all get the same error.
        """
        self._file: Any = None
        hosts.from_first(lambda: self._lock(workdir))

    def _lock(self, workdir: Path) -> int:
        paths.prepare_folder(workdir)
        if paths.is_remote(workdir):
            self._file = HeartbeatLock(workdir / ".lock")
            return 0
        path = workdir / ".lock"
        try:
            # Held until __exit__. Not "w", which would empty the file before its owner is read.
            self._file = path.open("a+")
        except OSError as error:
            message = (
                f"cannot write {path} ({error.strerror}): remove it, or choose another --workdir"
            )
            raise UserError(message) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if paths.has_no_locks(error):
                self._file.close()
                logging.warning(
                    "%s has no file locks (%s): %s, written again and again, keeps other runs out",
                    *(workdir, error.strerror, _HEARTBEAT),
                )
                self._file = HeartbeatLock(workdir / _HEARTBEAT)
                return 0
            # Held by another process, which wrote its id there.
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(
                f"another run (process {owner}) is training in {workdir}: wait for it, or choose "
                "another --workdir"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file:
            self._file.close()


class Checkpoints:
    """The checkpoints of one workdir, in WORKDIR/checkpoints/STEP."""

    def __init__(
        self,
        workdir: Path,
        keep: int,
        best_metric: str = "",
        identity: Mapping[str, Any] | None = None,
    ):
        """Opens the checkpoints of a workdir.

        Args:
            workdir: its folder.
            keep: how many of the newest to keep; also kept is the newest that was saved after a
                good step (`recovery`).
            best_metric: also keep the checkpoint with the lowest value of this metric; "": none.
            identity: JSON values that say what the weights are of; only checkpoints with the same
                load.
        """
        import orbax.checkpoint as ocp  # late: half a second that drawing never needs

        self._ocp = ocp
        _say_failures_once()
        self._folder = (workdir / "checkpoints").absolute()  # Orbax fails late on relative paths
        self._broken = workdir.absolute() / "broken_checkpoints"
        self._found_broken: list[str] = []
        hosts.from_first(self._tidy)
        policies = ocp.checkpoint_managers
        self._writing: int | None = None  # the step
        self.committed: int | None = None  # the newest that this run has written
        self.failed = False  # one could not be written
        self._after_bad_steps: dict[int, bool] = {}  # of the checkpoints seen so far
        # A checkpoint stays if any of these policies wants it.
        keepers: list[Any] = [_Newest(max(keep, 1), self._is_good)]
        if best_metric:
            keepers.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,  # `_Newest` decides over those
                )
            )
        # Orbax writes the scores to disk, for the next run to know them, only with a best_fn.
        best = {"best_fn": lambda metrics: metrics[best_metric], "best_mode": "min"}
        self._best_metric = best_metric
        self._identity = json.loads(json.dumps(identity or {}))  # as it is read back: tuples, lists
        self._manager = ocp.CheckpointManager(
            str(self._folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                cleanup_tmp_directories=True,
                # Training waits for the copy to the host; files are written in the background.
                enable_async_checkpointing=True,
                temporary_path_class=(
                    manifest.CommittedFolder if paths.is_remote(workdir) else manifest.RenamedFolder
                ),
                todelete_subdir=_REMOVED,  # on a disk alone
                **(best if best_metric else {}),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            self._manager.close()
        except Exception:
            if kind is None:  # never hide the first error behind the second
                raise

    def latest_step(self) -> int | None:
        """Returns the newest step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing `state`; a step that is already saved is left as it is.

        Raises UserError if this save or the one before it could not be written (disk full).
        """
        step = int(state.step)
        self.wait()  # a full disk shows here, not in Orbax's save()
        if step in self._manager.all_steps():
            return
        bad_steps = int(state.faults.in_a_row)
        meta = {"arrays": describe(state), "identity": self._identity, "bad_steps": bad_steps}
        self._after_bad_steps[step] = bool(bad_steps)
        # NaN has no place in an order: such a score counts as none.
        best = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        self._writing = step
        try:
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(state),
                    meta=self._ocp.args.JsonSave(meta),
                ),
                metrics=best if self._best_metric in best else None,
                force=True,  # when to save is the loop's decision, not Orbax's
            )
        except Exception as error:
            raise self._write_error(step, error) from error

    def check(self) -> None:
        """Raises UserError if the last save has failed in the meantime; waits for nothing."""
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises UserError if it could not be written."""
        step, self._writing = self._writing, None  # at once: a failure is reported one time
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._write_error(step, error) from error
        self.committed = step or self.committed
        self._remove_old()

    def _write_error(self, step: int | None, error: Exception) -> UserError:
        self.failed = True
        self._manager.reload()  # it counts what was not written as saved
        if jax.process_index() == 0 and not paths.is_remote(self._folder):
            for half in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)  # which the disk has room for again
        return UserError(
            f"could not write a checkpoint to {self._folder} (step {step}): {_first_line(error)}. "
            "Free some space or mend the folder and run the same command again"
        )

    def _remove_old(self) -> None:
        if jax.process_index() == 0 and not paths.is_remote(self._folder):
            shutil.rmtree(self._folder / _REMOVED, ignore_errors=True)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which belong to a path that was given up."""
        self.wait()
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)
        self._remove_old()

    def restore_latest(self, template: TrainState, good: bool = False) -> TrainState | None:
        """Restores the newest intact checkpoint, or returns None if there is none.

        Args:
            template: the state's shapes and shardings.
            good: only checkpoints that were saved after a good step.

        A damaged checkpoint is moved to WORKDIR/broken_checkpoints with a loud line, and the next
        older one is tried.

        Raises:
            UserError: checkpoints exist but none is intact; the newest is of another config, or
                cannot be read. Other errors (no memory) pass through, and nothing is moved.
        """
        self.wait()
        step = hosts.from_first(lambda: self._newest_whole(good))
        self._manager.reload()  # else a step that was set aside would not be saved again
        if step < 0:
            return None
        try:
            return self._restore(step, template)
        except OSError as error:
            raise UserError(f"cannot read {self._folder / str(step)}: {error}") from error

    def _newest_whole(self, good: bool) -> int:
        """Returns the newest (good) step whose files are what was written, or -1."""
        # From the newest on, since hashing reads all of a checkpoint. It comes before `_is_good`,
        # which trusts what the checkpoint says of itself.
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            if fault := self._read(folder, read_all=True):
                self._set_aside(folder, fault)
                continue
            if good and not self._is_good(step):
                continue
            if faults := list(self._broken.glob("*")):
                logging.warning("broken checkpoints lie in %s (%d)", self._broken, len(faults))
            return step
        # a later run must not start over in silence either
        if self._found_broken or self._broken.exists():
            raise UserError(
                f"{self._folder} held checkpoints but none is whole "
                f"({'; '.join(self._found_broken) or 'not complete'}). They are kept in "
                f"{self._broken}. To start from step 0 on purpose, use another --workdir."
            )
        return -1

    def _read(self, folder: Path, read_all: bool) -> str:
        try:
            with paths.as_user_error("cannot read", folder):
                return manifest.fault(folder, read_all)
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error}") from error

    def _restore(self, step: int, template: TrainState) -> TrainState:
        args = self._ocp.args
        # Before Orbax restores, as it would cast dtypes without a word.
        meta = self._meta(step)
        here, there = describe(template), meta["arrays"]
        changed = [k for k in sorted({*here, *there}) if here.get(k) != there.get(k)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self._folder} is of another config: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} here ({len(changed)} such array(s)). "
                "Use the config it was started with, or another --workdir."
            )
        # Equal shapes are not enough: with another CLIP or another schedule the same arrays would
        # mean something else.
        there, here = (_flat(identity) for identity in (meta.get("identity", {}), self._identity))
        for name in sorted(here.keys() & there.keys()):  # a key may be newer than the checkpoint
            if here[name] != there[name] and name.rpartition(".")[2] not in _MAY_CHANGE:
                raise UserError(
                    f"{self._folder} learned with another {name}: {there[name]} there, "
                    f"{here[name]} here. Use the config (and the CLIP) it was started with, or "
                    "another --workdir, where --config.init_from goes on from exported weights."
                )
        return self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(template))
        )["state"]

    def _meta(self, step: int) -> Any:
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]

    def _is_good(self, step: int) -> bool:
        """Returns whether a run may go back to a checkpoint.

        One that cannot be read counts as good.
        """
        if step not in self._after_bad_steps:  # of a former run
            try:
                self._after_bad_steps[step] = bool(self._meta(step)["bad_steps"])
            except Exception:  # kept rather than removed, and looked at again next time
                return True
        return not self._after_bad_steps[step]

    def _tidy(self) -> int:
        """Removes and sets aside what would mislead Orbax, before Orbax looks.

        Orbax takes an empty folder named `7` for the newest step, and reads the scores of every
        step. What a killed run was about to remove is removed for good.
        """
        paths.prepare_folder(self._folder)
        self._remove_old()
        with paths.as_user_error("cannot read", self._folder):
            steps = [path for path in self._folder.glob("*") if path.name.isdigit()]
            for path in steps:
                if not manifest.unfinished(path) and (fault := self._read(path, read_all=False)):
                    self._set_aside(path, fault)
        return 0

    def _set_aside(self, path: Path, fault: str) -> None:
        try:
            paths.make_folder(self._broken)
        except OSError as error:
            raise UserError(
                f"{path} is damaged ({fault}), and cannot be moved to {self._broken} "
                f"({error.strerror}): move that away"
            ) from error
        # The time, as one step may be damaged, written again and damaged again.
        target = self._broken / f"{path.name}.{time.time_ns()}"
        paths.move(path, target)
        self._found_broken.append(f"step {path.name}: {fault}")
        logging.error("CHECKPOINT %s IS DAMAGED: %s; moved it to %s", path.name, fault, target)


class _Newest:
    """Orbax's policy that keeps the `number` newest checkpoints, and the newest that `is_good`."""

    def __init__(self, number: int, is_good: Callable[[int], bool]):
        self._number, self._is_good = number, is_good

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]  # oldest first
        kept = {*steps[-self._number :], *[step for step in steps if self._is_good(step)][-1:]}
        return [step in kept for step in steps]


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested sections: {"model": {"dim": 8}} -> {"model.dim": 8}."""
    return traverse_util.flatten_dict(dict(identity), sep=".")


def _first_line(error: Exception) -> str:
    message = str(error).strip().splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {message[:200]}{'...' if len(message) > 200 else ''}"


def _say_failures_once() -> None:
    """Silences the tracebacks of writes that fail after another write did.

    Hundreds of them would be printed, since the loop that they report to is closed. `Checkpoints`
    reports the failure itself.
    """
    before = sys.unraisablehook
    if getattr(before, "is_ours", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.is_ours = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
