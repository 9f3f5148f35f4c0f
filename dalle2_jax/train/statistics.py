"""Statistics that a task fits to its data before the first step; they are never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.errors import UserError
from dalle2_jax.storage import model_folder, model_names
from dalle2_jax.train.optimizer import Optimizer
from dalle2_jax.train.outputs import Dataset
from dalle2_jax.train.state import TrainState, init_state
from dalle2_jax.train.step import gathering_layers, global_batch
from dalle2_jax.types import Array, Batch, Params, Task

STATISTICS = "statistics"  # the branch of the parameters that holds them


@runtime_checkable
class FitsStatistics(Protocol):
    """A Task whose parameters have a branch `statistics`, fitted once; `trainable` excludes it."""

    def fit(self, params: Params, frozen: Params, batches: Callable[[], Iterator[Batch]]) -> Params:
        """Returns the leaves of params["statistics"], replicated on every device.

        `batches()` yields the global batches of training from the first on, without end.
        """
        ...


def fresh_state(
    config: Any,
    task: Task,
    optimizer: Optimizer,
    template: TrainState,
    frozen: Params,
    dataset: Dataset,
    mesh: Mesh,
) -> TrainState:
    """Returns the state of step 0, with statistics fitted to the data or from config.init_from.

    Raises UserError if those of init_from were fitted to another CLIP's embeddings: training would
    never change them.
    """
    if config.init_from and isinstance(task, FitsStatistics):
        _check_clip(config.init_from, task, template.params)
    state = init_state(task, optimizer, config.seed, template, config.init_from)
    if config.init_from or not isinstance(task, FitsStatistics):
        return state

    # Batches of training from position 0: the statistics are a function of the config and the data.
    def batches() -> Iterator[Batch]:
        return (global_batch(local, mesh) for local in dataset(0))

    with gathering_layers(mesh, config.sharding_rules, state.params, frozen):
        fitted: Any = jax.tree.map(np.asarray, task.fit(state.params, frozen, batches))

    def put(params: Params) -> Params:  # each tree its own buffers: the state is donated
        def leaf(old: Array, new: np.ndarray) -> Array:
            new = new.astype(old.dtype)
            return jax.make_array_from_callback(old.shape, old.sharding, lambda i: new[i])

        return {**params, STATISTICS: jax.tree.map(leaf, params[STATISTICS], fitted)}

    return state.replace(params=put(state.params), ema_params=put(state.ema_params))


def _check_clip(init_from: str, task: Task, shapes: Params) -> None:
    folder = model_names.resolve(init_from)
    there, here = model_folder.read_stage(folder, task.stage), task.export(shapes)[0]
    if there.get("clip") != here.get("clip"):
        raise UserError(
            f"init_from={folder}: its {task.stage} was fitted to another CLIP "
            f"({there.get('clip')}) than config.clip_from's ({here.get('clip')}): start without it"
        )
