"""DDIM run backwards: the x_T from which it draws a given picture (2010.02502, section 4.3).

Deterministic DDIM goes x_t -> x_{t-1} by equations (2) and (3) of `solvers` with eta = 0. Put
x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) into (3) and solve for x_t:

    x_t = r x_{t-1} + (sqrt(1 - abar) - r sqrt(1 - abar_prev)) eps(x_t, t),
    r   = sqrt(abar / abar_prev)                                                             (1)

x_t stands on both sides. With eps at x_{t-1} in place of x_t this is the inversion of the paper,
whose error falls with the length of a step; putting the result in again (a fixed point,
2309.04907) makes it the step's exact inverse, each time at the cost of a network evaluation.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.schedules import extract
from dalle2_jax.diffusion.solvers.single import OverSchedule, batch_t
from dalle2_jax.types import Array, Denoiser, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class DDIMInversion(OverSchedule):
    """Equation (1), a `Solver` whose steps are taken with t from 0 up to T - 1.

    `iterations` of the fixed point in a step; 1 is the paper's inversion.
    """

    iterations: int = 1

    @property
    def evaluations(self) -> int:
        return self.schedule.num_timesteps * self.iterations

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        r = np.sqrt(abar / prev)
        return r, np.sqrt(1 - abar) - r * np.sqrt(1 - prev)

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        """x_{t-1} at scalar index t -> (x_t, memory); `noise` is not used."""
        c_x, c_eps = (extract(table, t, x_t.ndim) for table in self._tables)

        def again(_: Array, x: Array) -> Array:
            return c_x * x_t + c_eps * denoiser(x, batch_t(t, x)).eps

        return jax.lax.fori_loop(0, self.iterations, again, x_t.astype(jnp.float32)), memory
