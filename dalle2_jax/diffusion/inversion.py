"""DDIM run backwards: the x_T from which it samples a given image (2010.02502, section 4.3).

Deterministic DDIM goes x_t -> x_{t-1} by equations (2) and (3) of `solvers` with eta = 0. Put
x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) into (3) and solve for x_t:

    x_t = r x_{t-1} + (sqrt(1 - abar) - r sqrt(1 - abar_prev)) eps(x_t, t),
    r   = sqrt(abar / abar_prev)                                                             (1)

x_t is on both sides. With eps at x_{t-1} in place of x_t this is the inversion of the paper, whose
error falls with the length of a step. Putting the result in again (a fixed point, 2309.04907)
converges to the step's exact inverse, each time at the cost of a network evaluation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.schedules import extract
from dalle2_jax.diffusion.solvers.single import OverSchedule, batch_t
from dalle2_jax.diffusion.tables import table
from dalle2_jax.types import Array, Denoiser


@dataclasses.dataclass(frozen=True, eq=False)
class DDIMInversion(OverSchedule):
    """The coefficients of (1) over a schedule. One step, with `eps` the network at t:

    x = x_{t-1}
    repeat `iterations` times:  x = c_x x_{t-1} + c_eps eps(x)
    x_t = x                      1 iteration is the inversion of the paper
    """

    @table
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        # At t = 0 prev is 1: the first step leaves the image itself.
        r = np.sqrt(abar / prev)
        return r, np.sqrt(1 - abar) - r * np.sqrt(1 - prev)

    def inverse_step(
        self, denoiser: Denoiser, x_prev: Array, t: Array, iterations: Array | int
    ) -> Array:
        """Returns x_t float32 [b, ...] from x_{t-1}, at scalar index t."""
        c_x, c_eps = (extract(values, t, x_prev.ndim) for values in self._tables)

        def closer(_: Array, x: Array) -> Array:
            # Always from x_prev: only the point at which eps is evaluated moves.
            return c_x * x_prev + c_eps * denoiser(x, batch_t(t, x)).eps

        return jax.lax.fori_loop(0, iterations, closer, x_prev.astype(jnp.float32))


def invert_steps(
    solver: DDIMInversion,
    denoiser: Denoiser,
    x_t: Array,
    first: Array | int,
    count: Array | int,
    iterations: Array | int = 1,
) -> Array:
    """Takes `count` steps backwards from x_t [b, ...]: those of t = first, first + 1, ..."""

    def body(i: Array, x: Array) -> Array:
        return solver.inverse_step(denoiser, x, first + i, iterations)

    return jax.lax.fori_loop(0, count, body, x_t.astype(jnp.float32))
