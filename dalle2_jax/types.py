"""Array aliases and the three protocols on which the rooms of the house agree.

`Task` is what the trainer knows of a stage, `Denoiser` what a solver knows of a network, and
`Solver` what the sampling loop knows of a solver. Nothing here imports from the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
"""`image` uint8 [b, h, w, 3] and, for captioned data, `tokens` int32 [b, n]."""
Metrics = dict[str, Array]


class Prediction(NamedTuple):
    """A denoiser's prediction at x_t: solvers need the first two, ancestral ones the third too."""

    x_0: Array  # b ...
    eps: Array  # b ..., consistent with x_0 and x_t
    log_variance: Array | None = None  # b ..., of p(x_{t-1} | x_t), where it is learned


class Denoiser(Protocol):
    def __call__(self, x_t: Array, t: Array) -> Prediction:
        """x_t [b, ...] and the index t [b] int32 into the schedule that is being sampled."""
        ...


class Solver(Protocol):
    """One step of sampling, a pure function that `lax.scan` carries from t = T-1 down to 0."""

    @property
    def evaluations(self) -> int:
        """Number of network evaluations from x_T to x_0."""
        ...

    def init(self, x_t: Array) -> PyTree:
        """The solver's memory (past predictions); an empty tuple for a one-step solver."""
        ...

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        """x_t at scalar index t -> (x_{t-1}, memory). `noise` [b, ...] is standard normal."""
        ...


class Task(Protocol):
    """A stage of training, as the trainer sees it: no stage is known there by name."""

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
        """Fresh parameters; called under `jax.eval_shape` and under `jax.jit`."""
        ...

    def frozen(self) -> Params:
        """Parameters used but not trained (CLIP's), handed to the step as an argument."""
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: Array, train: bool
    ) -> tuple[Array, Metrics]:
        """Mean loss over the global batch (float32 scalar) and scalar metrics."""
        ...

    def preview(
        self, params: Params, frozen: Params, batch: Batch, key: Array, rows: int
    ) -> dict[str, Array]:
        """name -> uint8 [rows, columns, h, w, 3]: pictures of the first `rows` examples, or all."""
        ...

    def export(self, params: Params) -> tuple[Mapping[str, Any], Params]:
        """(the stage's entry in `config.json`, its tensors) for a model folder."""
        ...
