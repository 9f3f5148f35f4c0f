"""The train loop: mesh -> shardings -> state -> {batch, step, metrics, checkpoint} -> export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dalle2_jax import pictures, sharding
from dalle2_jax.errors import UserError
from dalle2_jax.train import checks
from dalle2_jax.train.checkpoint import Checkpoints, WorkdirLock
from dalle2_jax.train.metrics import Diverged, Reporter, Window
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.profile import Profile
from dalle2_jax.train.side import Dataset, SideWork
from dalle2_jax.train.state import TrainState, abstract_state, init_state
from dalle2_jax.train.step import check_batch_size, global_batch, make_train_step, place_frozen
from dalle2_jax.train.stop import Result, Stopper
from dalle2_jax.types import Task


def train(
    config: Any,
    task: Task,
    dataset: Dataset,
    workdir: str | Path,
    eval_dataset: Dataset | None = None,
    tensorboard: bool = False,
) -> Result:
    """Trains `task` to config.num_steps, going on from the newest checkpoint in `workdir`.

    `config` is a complete one (build.complete). Without `eval_dataset` nothing is evaluated, and
    previews show training pictures. Raises UserError for mistakes and where data, disk or folder
    fail on the way (what was learned till then is saved if it can be), Diverged where the loss or
    gradient is no longer finite (the last good checkpoint stays).
    """
    workdir = checks.folder(workdir, "--workdir")
    model = checks.export_folder(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    template = abstract_state(task, optimizer, config.seed, mesh, config.sharding_rules)
    frozen = place_frozen(task.frozen(), mesh)
    side = SideWork(config, task, frozen, mesh, eval_dataset or dataset, model)
    if config.best_metric:
        names = side.metric_names(template.params) if eval_dataset else ()
        checks.check_best_metric(config, names)
    identity = _identity(task, template)
    with (
        WorkdirLock(workdir),
        Checkpoints(workdir, config.keep, config.best_metric, identity) as checkpoints,
        Stopper(config.max_minutes, config.watchdog_seconds) as stopper,
    ):
        if (checkpoints.latest_step() or 0) < config.num_steps:
            checks.check_stands_alone(model, task.stage)
        if config.export_to:
            pictures.prepare_folder(model)  # not only after hours of training
        state = checkpoints.restore_latest(template)
        if state is None:
            state = init_state(task, optimizer, config.seed, template, config.init_from)
        else:
            logging.info("going on from step %d of %s", int(state.step), workdir)
            if config.init_from:
                logging.info("init_from=%s was for its first step", config.init_from)
        start = int(state.step)
        if start > config.num_steps:
            logging.warning("step %d is beyond config.num_steps=%d", start, config.num_steps)
        train_step = make_train_step(task, optimizer, config, template, mesh)
        data, window = dataset(start), Window(max(config.log_every, 1000))
        stopped_by, scores = None, {}
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        profile = Profile(config.profile, workdir, start)
        with Reporter(workdir, start, tensorboard) as report, profile:
            report.parameters(template.params)
            try:
                for step in range(start + 1, config.num_steps + 1):
                    state, metrics = train_step(state, frozen, global_batch(next(data), mesh))
                    window.add(step, metrics)
                    profile(step, metrics)
                    scores = {}
                    stopper.alive()
                    if on_cpu:  # simulated devices abort when steps queue up ("Rendezvous")
                        jax.block_until_ready(metrics)
                        window.check(newest_only=True)
                    if step == start + 1:
                        report.restart_clock(step)  # compiling is not speed
                    if _due(config.log_every, step, config.num_steps):
                        report.log(step, config.num_steps, config.batch_size, window.mean())
                    since = time.perf_counter()
                    stopper.rest()
                    if eval_dataset and _due(config.eval_every, step):
                        scores = side.evaluate(state.ema_params)
                        report.scalars(step, scores)
                    stopped_by = stopper.reason(step)
                    if _due(config.checkpoint_every, step, config.num_steps) or stopped_by:
                        window.check()  # a state that is not finite must not be kept
                        checkpoints.save(state, scores)
                    if _due(config.preview_every, step):
                        report.images(step, side.preview(state.ema_params))
                    if _due(config.export_every, step):
                        side.export(state.ema_params)
                    report.pause(time.perf_counter() - since)
                    stopper.alive()
                    if stopped_by:
                        break
            except (UserError, OSError) as error:  # a picture is gone, the disk is full
                stopper.rest()
                raise UserError(
                    f"{error}{_keep(checkpoints, window, state, scores, start)}"
                ) from error
        stopper.rest()
        checkpoints.wait()
        if stopped_by in (None, "max_minutes"):
            side.export(state.ema_params)
        return Result(int(state.step), stopped_by, state)


def _keep(
    checkpoints: Checkpoints, window: Window, state: TrainState, scores: dict, start: int
) -> str:
    """Saves `state` where the run fails on the way; what to tell of it."""
    step = int(state.step)
    if step == start or jax.process_count() > 1:  # saving needs every host, and they train on
        return ""
    try:
        window.check()
        checkpoints.save(state, scores)
        checkpoints.wait()
    except (UserError, OSError, Diverged):
        return ""
    return f" (step {step} is saved: mend that and run the same command again to go on)"


def _identity(task: Task, template: TrainState) -> dict[str, Any]:
    """What a checkpoint's weights are of: the stage's entry in `config.json` but for how it is
    sampled, which may change."""
    entry, _ = task.export(template.params)
    return {name: value for name, value in entry.items() if name != "sampling"}


def _due(every: int, step: int, last: int | None = None) -> bool:
    return (every > 0 and step % every == 0) or step == last


__all__ = ["Dataset", "Diverged", "Result", "train"]
