"""A thin module over Orbax: save, restore with proof, fall back, never start over in silence.

Orbax commits a checkpoint atomically but keeps no checksum over array data and casts dtypes
without a word, so every save carries a checksum per array (in the same commit) that is compared
after the restore. Sums of integers do not depend on the order, so they hold on any mesh.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from dalle2_jax import pictures, remote, sharding
from dalle2_jax.errors import UserError
from dalle2_jax.train.bucket import BucketLock
from dalle2_jax.train.state import TrainState
from dalle2_jax.types import Array, PyTree

# What Orbax raises over files that are missing, cut short or no longer what they were; it tells of
# array data by a bare Exception. Anything else (no memory, no permission) says nothing of the file.
_DAMAGE = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
# How a network is computed, not what it is.
_MAY_CHANGE = ("remat", "dtype", "dropout")
_NO_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Permission denied", "Too many open files")

_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _checksum(x: Array) -> Array:
    """Sum over the bits of x, each word times an odd number of its place, modulo 2^32.

    An odd factor keeps every single flipped bit visible, its place every exchange of two words.
    """
    bits = jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _checksums(leaves: list[Array]) -> Array:
    return jnp.stack([_checksum(x) for x in leaves])


def describe(state: PyTree) -> dict[str, list[Any]]:
    """path -> [shape, dtype]: what a config must share with a checkpoint to go on from it."""
    return {k: [list(x.shape), str(x.dtype)] for k, x in sharding.flatten(state).items()}


def checksums(state: TrainState) -> dict[str, int]:
    """path -> checksum of every array, computed where the shards lie."""
    leaves = sharding.flatten(state)
    everywhere = state.step.sharding  # replicated: every host reads the result
    sums = jax.jit(_checksums, out_shardings=everywhere)(list(leaves.values()))
    return dict(zip(leaves, np.asarray(sums).tolist(), strict=True))


class WorkdirLock:
    """Keeps a second trainer out of a workdir; the kernel drops it when the process dies."""

    def __init__(self, workdir: Path):
        """Raises UserError where another process holds it and where it cannot be written.

        One host of several locks for all.
        """
        self._file = None
        if jax.process_index():
            return
        pictures.prepare_folder(workdir)
        if remote.is_remote(workdir):
            self._file = BucketLock(workdir / ".lock")
            return
        self._file = open(workdir / ".lock", "a+")  # noqa: SIM115 (held until __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
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
        """Keeps the `keep` newest, and the one with the lowest `best_metric` if one is named.

        `identity` (JSON values) says what the weights are of; only checkpoints of the same load.
        """
        import orbax.checkpoint as ocp  # late: half a second that drawing never needs

        self._ocp = ocp
        self._folder = (workdir / "checkpoints").absolute()  # Orbax fails late on relative paths
        remote.make_folder(self._folder)
        self._broken = workdir.absolute() / "broken_checkpoints"
        self._set_uncommitted_aside()
        policies = ocp.checkpoint_managers
        keepers: list[Any] = [policies.LatestN(max(keep, 1))]
        if best_metric:
            keepers.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    reverse=True,  # the lowest is the best
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        # Orbax writes the scores to disk, for the next run to know them, only with a best_fn.
        best = {"best_fn": lambda metrics: metrics[best_metric], "best_mode": "min"}
        self._best_metric = best_metric
        self._identity = json.loads(json.dumps(identity or {}))  # as it is read back
        self._manager = ocp.CheckpointManager(
            str(self._folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keepers),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
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
        return self._manager.latest_step()

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing `state`; a step that is already there is left as it is.

        Raises UserError where this save or the one before it could not be written (disk full).
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = {"arrays": describe(state), "checksums": checksums(state)}
        meta["identity"] = self._identity
        best = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        try:
            self._manager.wait_until_finished()  # a full disk shows here, not in save()
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(state),
                    meta=self._ocp.args.JsonSave(meta),
                ),
                metrics=best if self._best_metric in best else None,
                force=True,
            )
        except Exception as error:
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Until the last save is on disk; raises UserError where it could not be written."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._write_error(self._manager.latest_step(), error) from error

    def _write_error(self, step: int | None, error: Exception) -> UserError:
        return UserError(
            f"could not write a checkpoint to {self._folder} (step {step}): {_first_line(error)}. "
            "Free some space or mend the folder and run the same command again"
        )

    def restore_latest(self, template: TrainState) -> TrainState | None:
        """The newest checkpoint that loads, in the shardings of `template`; None if none exists.

        A damaged checkpoint is moved to WORKDIR/broken_checkpoints with a loud line, and the next
        older one is tried. Raises UserError where checkpoints exist and none loads, where the
        newest is of another config and where it may not be read; other errors (no memory) go
        through, and nothing is moved.
        """
        faults = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, template)
            except UserError:
                raise
            except Exception as error:
                if not _is_damage(error):
                    if isinstance(error, OSError):
                        raise UserError(
                            f"cannot read {self._folder / str(step)}: {error}"
                        ) from error
                    raise
                faults.append(f"step {step}: {_first_line(error)}")
                logging.error("CHECKPOINT %d DOES NOT LOAD: %s", step, _first_line(error))
                self._set_aside(self._folder / str(step))
                self._manager.reload()  # else the step, reached again, would not be saved
        self._manager.reload()
        if faults or self._broken.exists():  # a later run must not start over in silence either
            told = "; ".join(faults) or "not complete"
            raise UserError(
                f"{self._folder} held checkpoints but none loads ({told}). They are kept in "
                f"{self._broken}. To start from step 0 on purpose, use another --workdir."
            )
        return None

    def _restore(self, step: int, template: TrainState) -> TrainState:
        args = self._ocp.args
        meta: Any = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))[
            "meta"
        ]
        here, there = describe(template), meta["arrays"]
        changed = [k for k in sorted({*here, *there}) if here.get(k) != there.get(k)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self._folder} is of another config: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} here ({len(changed)} such array(s)). "
                "Use the config it was started with, or another --workdir."
            )
        there, here = (_flat(identity) for identity in (meta.get("identity", {}), self._identity))
        for name in sorted(here.keys() & there.keys()):  # a key may be newer than the checkpoint
            if here[name] != there[name] and name.rpartition(".")[2] not in _MAY_CHANGE:
                raise UserError(
                    f"{self._folder} learned with another {name}: {there[name]} there, "
                    f"{here[name]} here. Use the config (and the CLIP) it was started with, or "
                    "another --workdir, where --config.init_from goes on from exported weights."
                )
        restored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(template))
        )["state"]
        sums = checksums(restored)
        damaged = [k for k, v in meta["checksums"].items() if sums[k] != v]
        if damaged:
            raise ValueError(f"damaged data: the checksum of {damaged[0]} differs")
        if faults := list(self._broken.glob("*")):
            logging.warning("broken checkpoints lie in %s (%d)", self._broken, len(faults))
        return restored

    def _set_uncommitted_aside(self) -> None:
        """Orbax takes an empty folder named `7` for the newest step: move such folders away.

        In a bucket, which has no empty folders, it goes by a file that it writes last.
        """
        if remote.is_remote(self._folder):
            return
        for folder in self._folder.iterdir():
            committed = (folder / "_CHECKPOINT_METADATA").exists()
            if folder.is_dir() and folder.name.isdigit() and not committed:
                logging.error("CHECKPOINT %s IS NOT COMPLETE", folder)
                self._set_aside(folder)

    def _set_aside(self, folder: Path) -> None:
        if jax.process_index():
            return
        remote.make_folder(self._broken)
        target = self._broken / f"{folder.name}.{int(time.time())}"
        if folder.exists():
            remote.move(folder, target)
            logging.error("moved it to %s", target)


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"dim": 8}} -> {"model.dim": 8}."""
    return traverse_util.flatten_dict(dict(identity), sep=".")


def _is_damage(error: Exception) -> bool:
    told = f"{error} {error.__cause__}"
    kind = type(error) is Exception or isinstance(error, _DAMAGE)
    return kind and not any(sign in told for sign in _NO_DAMAGE)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
