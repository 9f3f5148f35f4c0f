"""The train loop: mesh -> shardings -> state -> {batch, step, metrics, checkpoint} -> export.

The order matters. Everything that can fail without training is done first: folders, the mesh, the
shapes of the state, the names of metrics. The state is described before it is made
(`abstract_state`) because only its shapes and shardings are needed to look for a checkpoint, and
because parameters are then created straight in their shards: no device ever holds all of them. In
the loop, a step is dispatched before anything of the last one is read, so that the devices do not
wait for the host; `Recovery` therefore looks at gradients that are two steps old. A step is
recovered from before it is saved, and saved before previews and exports, which may fail: what was
learned is on disk first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import paths
from dalle2_jax.train import checks, hosts
from dalle2_jax.train.checkpoint import Checkpoints, WorkdirLock
from dalle2_jax.train.metrics import Reporter, Window, last_saved
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.outputs import Dataset, Outputs, keep_licences
from dalle2_jax.train.profile import Profile
from dalle2_jax.train.recovery import Diverged, Recovery, keep
from dalle2_jax.train.state import TrainState, abstract_state
from dalle2_jax.train.statistics import fresh_state
from dalle2_jax.train.step import TrainStep, global_batch, make_train_step, place_frozen
from dalle2_jax.train.stop import Result, Stopper
from dalle2_jax.types import Params, Task


def train(
    config: Any,
    task: Task,
    dataset: Dataset,
    workdir: str | Path,
    eval_dataset: Dataset | None = None,
    tensorboard: bool = False,
) -> Result:
    """Trains `task` to config.num_steps, resuming from the newest checkpoint in `workdir`.

    Args:
        config: a complete config (`build.complete`).
        dataset: position -> the batches from there on.
        eval_dataset: the same of held-out data; None: no evaluation, previews of training images.
        tensorboard: also write TensorBoard's files.

    Raises:
        UserError: a mistake, or data, disk or folder failed on the way; learned weights are saved.
        Diverged: going back to the last good checkpoint (`recovery`) did not help; it stays.
    """
    workdir = checks.folder(workdir, "--workdir")
    model = checks.export_folder(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.num_steps, task.trainable)
    template = abstract_state(
        task, optimizer, config.seed, mesh, config.sharding_rules, config.offload
    )
    # Frozen parameters are no part of the state: not checkpointed, averaged or donated.
    frozen = place_frozen(task.frozen(), mesh)
    outputs = Outputs(config, task, frozen, mesh, eval_dataset or dataset, model, dataset)
    if config.best_metric:  # of a misspelt name no checkpoint would ever be the best
        names = outputs.metric_names(template.params) if eval_dataset else ()
        checks.check_best_metric(config, names)
    identity = _identity(task, template)
    # The lock comes first: a second trainer would change the checkpoints that this one reads.
    with (
        WorkdirLock(workdir),
        Checkpoints(workdir, config.keep, config.best_metric, identity) as checkpoints,
        Stopper(config.max_minutes, config.watchdog_seconds) as stopper,
    ):
        # A finished run that is started again trains nothing, so it replaces no CLIP either.
        if (checkpoints.latest_step() or 0) < config.num_steps:
            checks.check_stands_alone(model, task.stage)
        if config.export_to:
            paths.prepare_folder(model)  # not only after hours of training
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        # Steps are in lock-step on simulated devices (see `run`), so there is no lag to use. Else
        # two steps are in flight when the host looks at the one before them.
        recovery = Recovery(
            checkpoints,
            template,
            # Deferred: it may fit statistics to the data, and with a checkpoint it is not needed.
            lambda: fresh_state(config, task, optimizer, template, frozen, dataset, mesh),
            config.max_skips,
            lag=0 if on_cpu else 2,
        )
        state = recovery.start()
        start = int(state.step)
        if start:
            logging.info("resuming from step %d of %s", start, workdir)
            if config.init_from:
                logging.info("init_from=%s was for its first step", config.init_from)
        else:
            # Before `Reporter`, which drops the lines after step 0 and with them the evidence.
            checks.check_not_lost(workdir, last_saved(workdir))
        keep_licences(config, model)
        if start > config.num_steps:
            logging.warning("step %d is beyond config.num_steps=%d", start, config.num_steps)
        with (
            Reporter(workdir, start, int(state.position), tensorboard) as report,
            Profile(config.profile, workdir, start) as profile,
        ):
            report.parameters(template.params)
            report.saved(start)  # the run before may have ended between a checkpoint and its line
            session = _Session(
                config=config,
                mesh=mesh,
                frozen=frozen,
                dataset=dataset,
                evaluates=eval_dataset is not None,
                train_step=make_train_step(task, optimizer, config, template, mesh),
                checkpoints=checkpoints,
                recovery=recovery,
                outputs=outputs,
                report=report,
                profile=profile,
                stopper=stopper,
                on_cpu=on_cpu,
            )
            state, step, stopped_by = session.run(state)
            stopper.busy()
            # The last save is still being written in the background.
            checkpoints.wait()
            report.saved(checkpoints.committed)
        # Not after a signal: whoever sent it, a scheduler for one, may kill the process soon.
        if stopped_by in (None, "max_minutes"):
            outputs.export(state.ema_params)
        return Result(step, stopped_by, state)


@dataclasses.dataclass
class _Session:
    """The loop itself, with everything that it talks to."""

    config: Any
    mesh: Mesh
    frozen: Params
    dataset: Dataset
    evaluates: bool
    train_step: TrainStep
    checkpoints: Checkpoints
    recovery: Recovery
    outputs: Outputs
    report: Reporter
    profile: Profile
    stopper: Stopper
    on_cpu: bool
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # of the present step

    def run(self, state: TrainState) -> tuple[TrainState, int, str | None]:
        """Trains to the end, or until the run is stopped; returns (state, step, stopped by)."""
        config, start = self.config, int(state.step)
        step, stopped_by = start, None
        data, window = self._open_data(int(state.position))
        try:
            while step < config.num_steps and not stopped_by:
                batch = global_batch(next(data), self.mesh)
                # The first call compiles. A rollback to `start` comes by here again, on all hosts.
                if step == start:
                    hosts.compile_together(self.train_step, state, self.frozen, batch)
                # Returns at once: `state` and `metrics` are futures, the old state is donated.
                # `step` is counted on the host, since int(state.step) would wait for the device.
                state, metrics = self.train_step(state, self.frozen, batch)
                step, self.scores = step + 1, {}
                window.add(metrics)
                self.recovery.add(step, metrics)
                self.profile(step, metrics)
                self.stopper.alive()
                if self.on_cpu:  # simulated devices abort when steps queue up ("Rendezvous")
                    jax.block_until_ready((state, metrics))
                if step == start + 1:
                    self.report.restart_clock(step)  # compiling is not speed
                stopped_by = self.stopper.reason()
                save = _due(config.checkpoint_every, step, config.num_steps) or stopped_by
                # Before a save all metrics are read, so that no bad state is saved as a good one.
                if bad_end := self.recovery.bad_end(read_all=bool(save)):
                    self.stopper.busy()
                    state, event = self.recovery.go_back(state, bad_end)
                    step, position = int(state.step), int(state.position)
                    data, window = self._open_data(position)
                    self.report.go_back(step, position, event)
                    continue  # a stop that is due ends the loop: this state is on disk, or step 0's
                if _due(config.log_every, step, config.num_steps):
                    self.report.log(step, config.num_steps, config.batch_size, window.mean())
                self._after_step(state, step, bool(save), bool(stopped_by))
        except (UserError, OSError) as error:  # an image is gone, the disk is full
            self.stopper.busy()
            hint = keep(self.checkpoints, state, self.scores, start)
            raise UserError(f"{error}{hint}") from error
        return state, step, stopped_by

    def _open_data(self, position: int) -> tuple[Iterator[Any], Window]:
        """Returns the batches from `position` on, and an empty window of metrics."""
        return self.dataset(position), Window(max(self.config.log_every, 1000))

    def _after_step(self, state: TrainState, step: int, save: bool, stopping: bool) -> None:
        """Evaluates, saves, previews and exports, each when it is due."""
        config, since = self.config, time.perf_counter()
        self.stopper.busy()
        self.checkpoints.check()  # a disk that filled up in the meantime
        # Evaluated before the save, which writes the scores beside the weights (`best_metric`).
        if self.evaluates and _due(config.eval_every, step):
            self.scores = self.outputs.evaluate(state.ema_params)
            self.report.scalars(step, self.scores)
        # Saved before previews and exports, which may fail: what was learned is on disk first.
        if save:
            self.recovery.save(state, self.scores, stopping or step == config.num_steps)
        self.report.saved(self.checkpoints.committed)
        if _due(config.preview_every, step):
            self.report.images(step, self.outputs.preview(state.ema_params))
        if _due(config.export_every, step):
            self.outputs.export(state.ema_params)
        self.report.pause(time.perf_counter() - since)
        self.stopper.alive()


def _identity(task: Task, template: TrainState) -> dict[str, Any]:
    """Returns the stage's entry in `config.json` without its sampling settings, which may change.

    It identifies the weights of a checkpoint.
    """
    entry, _ = task.export(template.params)
    return {name: value for name, value in entry.items() if name != "sampling"}


def _due(every: int, step: int, last: int | None = None) -> bool:
    return (every > 0 and step % every == 0) or step == last


__all__ = ["Dataset", "Diverged", "Result", "train"]
