"""Generating the missing part of an image y that is known where a mask m is 1.

    x_0 <- m y + (1 - m) x_0, and eps that fits it                                           (1)
    x_t = sqrt(a) x_{t-1} + sqrt(1 - a) noise,  a = abar_t / abar_{t-1}                      (2)

(1) puts the known pixels into every prediction (GLIDE's code for 2112.10741, section 2.3; as a
projection, DDNM 2212.00490, equation 13). A network that was not trained to read them fits the
rest to them only little by little: one step smooths the seam a little, and noise undoes part of it.
(2) goes one step back and takes the step again, several times, so that both parts can agree
(RePaint 2201.09865, section 4.2, with jumps of one step).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.gaussian import eps_from_x_0
from dalle2_jax.diffusion.schedules import Schedule, extract
from dalle2_jax.diffusion.tables import table
from dalle2_jax.types import Array, Denoiser, Prediction, PyTree, Solver


def keeping(schedule: Schedule, denoiser: Denoiser, known: Array) -> Denoiser:
    """Returns the denoiser under (1); `known` [b, h, w, 4] holds m y and m.

    The prediction at t = 0 stays as it is: there the network smooths the seam, and the known pixels
    are pasted over the result afterwards.
    """
    # y comes multiplied by m already (`imaging.masks.partly_known`).
    y, m = known[..., :-1], known[..., -1:]

    def with_known(x_t: Array, t: Array) -> Prediction:
        pred = denoiser(x_t, t)
        x_0 = jnp.where((t > 0)[:, None, None, None], y + (1 - m) * pred.x_0, pred.x_0)
        # As after a clip: eps has to fit the x_0 that was put in.
        return pred._replace(x_0=x_0, eps=eps_from_x_0(schedule, x_t, x_0, t))

    return with_known


def num_calls(steps: int, repeats: int) -> int:
    """Returns the number of steps of `Resampling`: each of `steps` repeated, but not the last."""
    return (steps - 1) * repeats + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Resampling:
    """Equation (2): takes every step of a deterministic `solver` several times; a `Solver` itself.

    call t = (steps - 1) * repeats .. 0         `num_calls` in all
        s       = the solver's own step          each repeated but s = 0
        x_{s-1} = solver.step(x_s)
        if it is to be repeated:  x_s = sqrt(a) x_{s-1} + sqrt(1 - a) noise of this call
    """

    solver: Solver
    schedule: Schedule
    repeats: int

    @table
    def _noising(self) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients of x_{t-1} and of the noise in (2)."""
        return np.sqrt(self.schedule.alpha), np.sqrt(1 - self.schedule.alpha)

    @property
    def evaluations(self) -> int:
        return num_calls(self.solver.evaluations, self.repeats)

    def init(self, x_t: Array) -> PyTree:
        return self.solver.init(x_t)

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        # With repeats = 2 and 3 steps:  t      4 3 2 1 0
        #                                step s 2 2 1 1 0
        #                                again  1 0 1 0 0
        call, again = jnp.divmod(jnp.maximum(t - 1, 0), self.repeats)
        t = jnp.where(t > 0, call + 1, 0)
        x_prev, memory = self.solver.step(denoiser, x_t, t, noise, memory)
        signal, sigma = (extract(values, t, x_t.ndim) for values in self._noising)
        # The solver is deterministic, so this call's noise is free for the way back.
        return jnp.where(again > 0, signal * x_prev + sigma * noise, x_prev), memory
