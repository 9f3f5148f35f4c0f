"""Outputs of the averaged weights during training: scores, previews, the exported model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dalle2_jax.data.config import DataConfig
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import grids
from dalle2_jax.storage import licence, model_folder, model_names, paths
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.train import hosts
from dalle2_jax.train.state import EVAL_STREAM, MEASURE_STREAM, PREVIEW_STREAM, on_device, stream
from dalle2_jax.train.step import global_batch, make_eval_step, make_measure, make_preview
from dalle2_jax.types import Params, Task

READABLE = 96  # pixels: smaller previews are enlarged, so that captions have room
Dataset = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
"""start step -> this host's batches from that step on: the step number is the position."""


class Outputs:
    """Evaluates, previews, measures and exports averaged weights."""

    def __init__(
        self,
        config: Any,
        task: Task,
        frozen: Params,
        mesh: Mesh,
        dataset: Dataset,
        folder: Path,
        measured: Dataset,
    ):
        """Prepares the jitted functions; nothing is compiled or read yet.

        Args:
            dataset: held-out data if there are any, else those of training.
            folder: the model folder to write.
            measured: the data of training.
        """
        self._config, self._task, self._frozen, self._mesh = config, task, frozen, mesh
        self._dataset, self._measured = dataset, measured
        self._eval_step = make_eval_step(task, config.sharding_rules, mesh)
        self._preview = make_preview(task, config.sharding_rules, mesh, config.preview_size)
        self._measure = make_measure(task, config.sharding_rules, mesh)
        self._folder = folder

    @functools.cached_property
    def _batches(self) -> list[Mapping[str, np.ndarray]]:
        """The first batches, read once: the same at every evaluation."""
        # On the host: they would take the devices' memory between two evaluations.
        return list(itertools.islice(self._dataset(0), max(self._config.eval_batches, 1)))

    def metric_names(self, params: Params) -> list[str]:
        """Returns the names of the metrics that `evaluate` would give; nothing is computed."""
        batch = global_batch(self._batches[0], self._mesh)
        key = stream(self._config.seed, EVAL_STREAM)
        return [
            f"eval/{n}" for n in jax.eval_shape(self._eval_step, params, self._frozen, batch, key)
        ]

    def evaluate(self, params: Params) -> dict[str, float]:
        """Returns mean metrics over the first batches, with the same noise every time."""
        key = stream(self._config.seed, EVAL_STREAM)
        total: dict[str, float] = {}
        count = len(self._batches)
        for i, batch in enumerate(self._batches):
            args = params, self._frozen, global_batch(batch, self._mesh), jax.random.fold_in(key, i)
            if i == 0:
                hosts.compile_together(self._eval_step, *args)
            metrics = self._eval_step(*args)
            # Each batch has the same number of rows, so a mean of means is the mean.
            for name, value in jax.device_get(metrics).items():
                total[f"eval/{name}"] = total.get(f"eval/{name}", 0.0) + float(value) / count
        return total

    def preview(self, params: Params) -> dict[str, np.ndarray]:
        """Returns name -> uint8 [h, w, 3]: a row for each example, under its caption.

        The examples are the first of the data and the noise is the same every time, so that the
        images can be compared over a run.
        """
        batch = global_batch(self._batches[0], self._mesh)
        args = params, self._frozen, batch, stream(self._config.seed, PREVIEW_STREAM)
        hosts.compile_together(self._preview, *args)
        shown, tokens = jax.device_get(self._preview(*args))
        return {name: self._grid(rows, tokens) for name, rows in shown.items()}

    def _grid(self, rows: np.ndarray, tokens: np.ndarray | None) -> np.ndarray:
        """[rows, columns, h, w, 3] and tokens int32 [rows, n] -> one image."""
        captions = []
        if tokens is not None:
            vocab_size = self._config.data.get("vocab_size", DataConfig.vocab_size)
            tokenizer = Tokenizer(tokens.shape[1], vocab_size)
            captions = [tokenizer.decode(row) for row in tokens[: len(rows)]]
        columns, size = rows.shape[1:3]
        cells = rows.reshape(-1, *rows.shape[2:])
        scale = max(1, READABLE // size)
        return grids.labelled_grid(cells, columns, row_labels=captions, scale=scale)

    def measure(self, params: Params) -> dict[str, list[float]]:
        """Returns what the task measures of its network, for the stage's entry.

        A mean over the first `eval_batches` batches of training, the same for the same weights. The
        batches are read again: the training's own place in the data stays.
        """
        if self._measure is None:
            return {}
        key, count = stream(self._config.seed, MEASURE_STREAM), max(self._config.eval_batches, 1)
        total: dict[str, Any] = {}
        for i, batch in enumerate(itertools.islice(self._measured(0), count)):
            args = params, self._frozen, global_batch(batch, self._mesh), jax.random.fold_in(key, i)
            if i == 0:
                hosts.compile_together(self._measure, *args)
            for name, value in jax.device_get(self._measure(*args)).items():
                total[name] = total.get(name, 0.0) + np.asarray(value, np.float64) / count
        return {name: [float(f"{v:.6g}") for v in values] for name, values in total.items()}

    def export(self, params: Params) -> None:
        """Writes the averaged weights as a stage of the model folder."""
        # On every host, not only the one that writes: both run collectives.
        measured = self.measure(params)
        entry, tensors = self._task.export(_gather(params))
        entry = {**entry, **measured}
        if jax.process_index() == 0:
            dtype = self._config.export_dtype
            model_folder.write_stage(self._folder, self._task.stage, entry, tensors, dtype)
            logging.info("wrote stage %s to %s", self._task.stage, self._folder)


def keep_licences(config: Any, folder: Path) -> None:
    """Writes the licences of the weights that this training starts from into the model folder.

    What training makes of them is derived from them. Raises UserError if a licence cannot be read
    or written.
    """
    if jax.process_index() != 0:
        return
    for name in filter(None, (config.init_from, config.get("clip_from", ""))):
        try:
            source = model_names.resolve(name)
        except UserError:  # gone since the first step, when it was kept
            continue
        if text := licence.read(source):
            licence.add(text, paths.prepare_folder(folder))


def _gather(params: Params) -> Params:
    """Returns the arrays, not split, on this host."""
    if jax.process_count() == 1:
        return jax.device_get(params)
    from jax.experimental import multihost_utils

    # A collective: averages that wait in the host's memory come to the devices for it.
    return multihost_utils.process_allgather(on_device(params), tiled=True)
