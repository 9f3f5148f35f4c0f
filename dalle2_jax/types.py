"""Names for arrays, and the three protocols on which the rooms of the package agree.

`Denoiser` is what a solver knows of a network, `Solver` what the sampling loop knows of a solver,
and `Task` what the trainer knows of a stage. Each is on one side of a boundary, so that either side
can be replaced without the other: a new solver needs no change of a network, a new stage none of
the trainer. Nothing here imports from the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
Params = Mapping[str, Any]
"""Parameters of a network as Flax has them: mappings nested by module, with arrays as leaves."""
Batch = Mapping[str, Array]
"""`image` uint8 [b, h, w, 3] and, for captioned data, `tokens` int32 [b, n]."""
Metrics = dict[str, Array]
"""float32 scalars by name."""


class Prediction(NamedTuple):
    """A denoiser's prediction at x_t: solvers need the first two, ancestral ones the third too.

    Attributes:
        x_0: [b, ...], the predicted clean example.
        eps: [b, ...], the noise in x_t, if that is x_0: the two are consistent.
        log_variance: [b, ...], of p(x_{t-1} | x_t); None if the network does not learn it.
    """

    x_0: Array
    eps: Array
    log_variance: Array | None = None


class Denoiser(Protocol):
    """A network with its condition, guidance and parametrisation, as a solver calls it."""

    def __call__(self, x_t: Array, t: Array) -> Prediction:
        """Predicts x_0 from a noisy x_t.

        Args:
            x_t: float [b, ...].
            t: int32 [b], index into the schedule that is being sampled; T - 1 is pure noise.
        """
        ...


class Solver(Protocol):
    """One step of sampling, as a pure function that a loop carries from t = T - 1 down to 0."""

    @property
    def evaluations(self) -> int:
        """Number of network evaluations from x_T to x_0."""
        ...

    def init(self, x_t: Array) -> PyTree:
        """Returns the memory before the first step: room for past predictions.

        A solver that needs none returns ().
        """
        ...

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        """Takes one step.

        Args:
            denoiser: evaluated once or several times.
            x_t: [b, ...].
            t: int32 scalar, index into the schedule.
            noise: [b, ...], standard normal; a deterministic solver ignores it.
            memory: what `init` or the step before returned.

        Returns:
            x_{t-1} [b, ...] and the memory for the next step.
        """
        ...


class Task(Protocol):
    """A stage of training, as the trainer sees it, which knows no stage by name.

    A task holds networks and settings, but no parameters: those are arguments of its methods, so
    that the trainer can shard, donate and average them.
    """

    stage: str
    """The stage's name in a model folder: `clip`, `prior`, `decoder`, `upsampler_64`, ..."""

    @property
    def optional_layer(self) -> str:
        """The name of a layer that the weights of `init_from` may lack; "": none.

        It then starts at zero, so that the network with it computes what it did without.
        """
        ...

    def trainable(self, path: str) -> bool:
        """Returns whether the parameter at `path` (as `blocks/attn/kernel`) is trained.

        One that is not keeps its value to the bit, in the parameters and in the moving average.
        """
        ...

    def init(self, key: Array) -> Params:
        """Returns fresh parameters; called under `jax.eval_shape` and under `jax.jit`."""
        ...

    def frozen(self) -> Params:
        """Returns parameters that are used but not trained, such as CLIP's.

        They are an argument of the jitted step: as constants they would be compiled into it.
        """
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss over the global batch, and metrics.

        Args:
            params: as `init` returns them.
            frozen: as `frozen` returns them.
            batch: arrays [b, ...] of all devices together.
            key: for everything random in the loss.
            train: False for evaluation: without dropout and augmentation.

        Returns:
            A float32 scalar and float32 scalars by name.
        """
        ...

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """Samples images that show how far training is.

        Args:
            rows: the number of examples of the batch to show; all if it has fewer.

        Returns:
            Name -> uint8 [rows, columns, h, w, 3], a grid for people to look at.
        """
        ...

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        """Returns the stage's entry in `config.json` and its tensors, for a model folder."""
        ...
