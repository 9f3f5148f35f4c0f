"""Checks before the first step: mistakes are reported in one line, with nothing written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.storage import model_folder, paths


def folder(name: str | os.PathLike[str], setting: str) -> Path:
    """Returns `name` as an absolute path, or one in a bucket; raises UserError for "" or a file."""
    text = os.path.expanduser(str(name))
    if not text.strip():
        raise UserError(f"{setting} is empty: name a folder")
    if paths.is_remote(text):
        try:
            return paths.to_path(text)
        except UserError as error:
            raise UserError(f"{setting}={error}") from error
    if os.path.exists(text) and not os.path.isdir(text):
        raise UserError(f"{setting}={text} is a file: name a folder")
    return Path(text).absolute()


def export_folder(config: Any, workdir: Path) -> Path:
    """Returns the model folder to write; raises UserError if writing would fail at the end."""
    known = get_args(model_folder.StorageDtype)
    if config.export_dtype not in known:
        raise UserError(
            f"config.export_dtype={config.export_dtype!r} is unknown"
            f"{near_miss(config.export_dtype, known)} ({', '.join(known)})"
        )
    model = folder(config.export_to or workdir / "model", "config.export_to")
    with paths.as_user_error("cannot read", model):
        if (model / model_folder.CONFIG_NAME).exists():
            model_folder.read_config(model)  # the stages in it are kept, so it must be sound
    return model


def check_stands_alone(folder: Path, stage: str) -> None:
    """Raises UserError if other stages in `folder` depend on the one (the CLIP) to be trained.

    With another CLIP they generate nothing: their weights would be lost. `write_stage` would refuse
    too, but only after the training.
    """
    if standing := model_folder.dependents(folder, stage):
        raise UserError(
            f"{folder} holds {' and '.join(standing)}, trained with the {stage} there, which this "
            "run would replace: give another --config.export_to, or move that folder away"
        )


def check_not_lost(workdir: Path, last_saved: int) -> None:
    """Raises UserError if no checkpoint is found although the metrics mention one.

    Starting over would delete these metrics and replace the model.
    """
    if last_saved:
        raise UserError(
            f"{workdir} holds no checkpoint, though its metrics.jsonl tells of one of step "
            f"{last_saved}: put the checkpoints back, or start over in another --workdir (here: "
            "delete that file)"
        )


def check_best_metric(config: Any, names: Iterable[str]) -> None:
    """Raises UserError if `config.best_metric` would never keep a checkpoint.

    `names` are the metrics of evaluation, none without held-out data.
    """
    names, every, save = list(names), config.eval_every, config.checkpoint_every
    setting = f"config.best_metric={config.best_metric!r}"
    if not names or not every:
        raise UserError(f"{setting} needs evaluation: set config.data.eval_split and eval_every")
    if config.best_metric not in names:
        raise UserError(
            f"{setting} is nothing that evaluation gives{near_miss(config.best_metric, names)} "
            f"({', '.join(names)})"
        )
    # The last step is saved always, and evaluated if `every` divides it. Otherwise a step before it
    # must be a multiple of both.
    if config.num_steps % every and not (save and math.lcm(every, save) <= config.num_steps):
        raise UserError(
            f"{setting}: no checkpoint is saved at a step that is evaluated; make "
            f"config.checkpoint_every={save} a multiple of config.eval_every={every}"
        )
