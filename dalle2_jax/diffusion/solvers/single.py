"""Solvers that remember nothing: one step x_t at index t -> x_{t-1}, with abar(-1) = 1.

DDPM, ancestral (DDPM 2006.11239, algorithm 2):
    x_{t-1} = posterior mean(x_0, x_t) + exp(log variance / 2) noise, no noise at t = 0      (1)

DDIM (2010.02502, equations 12 and 16), eta = 0 deterministic, eta = 1 equal to DDPM:
    s       = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)              (2)
    x_{t-1} = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - s^2) eps + s noise                  (3)
Analytic-DPM (2201.06503, see `analytic`) leaves the means and takes other variances of the noise.

Heun (EDM 2206.00364, algorithm 1, without churn). With alpha = sqrt(abar), sigma = sqrt(1 - abar)
their variable is x / alpha, their noise level sigma / alpha, whose log falls by h, and their
derivative eps. In our variables, and written with x_0, that is
    x'      = alpha_{t-1} x_0(x_t, t) + sigma_{t-1} eps(x_t, t)                              (4)
    x_{t-1} = x' + alpha_{t-1} (exp(h) - 1) / 2 (x_0(x', t-1) - x_0(x_t, t))                 (5)
(4) is DDIM's step, and all there is at t = 0. In (5) the network is evaluated again. Its factor
(exp(h) - 1) / 2 is held at 1, where the second x_0 takes the place of the first: it would run away
in steps of h > log 3, which the noisiest of a few are.

Coefficients are float64 tables over t.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.gaussian import q_posterior
from dalle2_jax.diffusion.schedules import Schedule, extract
from dalle2_jax.diffusion.tables import table
from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, Denoiser, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class OverSchedule:
    """The schedule that is sampled, with the defaults that most solvers share."""

    schedule: Schedule

    spacing: ClassVar[str] = "even"
    """The spacing of `schedules.respace` that suits the solver. Even steps end in one long stride
    of log-SNR, over which a second-order step diverges: those solvers use "logsnr"."""

    @property
    def evaluations(self) -> int:
        """Number of network evaluations from x_T to x_0."""
        return self.schedule.num_timesteps

    def init(self, x_t: Array) -> PyTree:
        return ()

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class DDPM(OverSchedule):
    """Equation (1), with the learned variance if the denoiser gives one.

        x_0     = network at x_t
        mean    = posterior mean of x_{t-1} given x_0 and x_t
        x_{t-1} = mean + sqrt(variance) noise           no noise at t = 0

    Otherwise `variance` is "small" (beta~), "large" (beta), or a table [T] (Analytic-DPM's, say).
    """

    variance: str | np.ndarray = "small"

    def __post_init__(self) -> None:
        if isinstance(self.variance, str) and self.variance not in ("small", "large"):
            raise UserError(f"variance must be 'small', 'large' or a table, not {self.variance!r}")

    @table
    def _log_variance(self) -> np.ndarray:
        if not isinstance(self.variance, str):
            # Analytic variances may be 0, at t = 0 above all, where no noise is added anyway.
            return np.log(np.maximum(self.variance, 1e-20))
        if self.variance == "large":
            return np.log(self.schedule.beta)
        return self.schedule.posterior_log_variance_clipped

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        mean, _, _ = q_posterior(self.schedule, pred.x_0, x_t, t)
        log_variance = pred.log_variance
        if log_variance is None:
            log_variance = extract(self._log_variance, t, x_t.ndim)
        # Not log variance -inf: the clipped one at t = 0 is finite, so zero is said here.
        std = jnp.where(t > 0, jnp.exp(0.5 * log_variance), 0.0)
        return mean + std * noise, memory


@dataclasses.dataclass(frozen=True, eq=False)
class DDIM(OverSchedule):
    """Equations (2) and (3); `variance` [T], if given, is that of the noise, in place of s^2.

    x_0, eps = network at x_t
    x_{t-1}  = sqrt(abar_{t-1}) x_0                 the prediction, shrunk to the next noise level
             + sqrt(1 - abar_{t-1} - s^2) eps       the noise that was predicted, kept
             + s noise                              and fresh noise: none at eta = 0
    """

    eta: float = 0.0
    variance: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM's eta must be within 0 and 1, not {self.eta}")

    @table
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = self.eta * np.sqrt(self.schedule.posterior_variance)  # (2), for it is eta^2 beta~
        prev = self.schedule.alpha_bar_prev
        # Another variance replaces the noise alone: the mean keeps the s of eta.
        noise = s if self.variance is None else np.sqrt(self.variance)
        # s^2 <= beta~ <= 1 - prev, so only rounding could make the root's argument negative.
        return np.sqrt(prev), np.sqrt(np.maximum(1 - prev - s**2, 0)), noise

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        c_x_0, c_eps, c_noise = (extract(table, t, x_t.ndim) for table in self._tables)
        return c_x_0 * pred.x_0 + c_eps * pred.eps + c_noise * noise, memory


@dataclasses.dataclass(frozen=True, eq=False)
class Heun(OverSchedule):
    """Equations (4) and (5). Deterministic; two evaluations a step, one at the last.

    x_0, eps = network at x_t
    x'       = DDIM's step to t - 1
    x_0'     = x_0 of the network at x'             not at t = 0
    x_{t-1}  = x' + c (x_0' - x_0)                  the mean of both slopes
    """

    spacing: ClassVar[str] = "logsnr"

    @property
    def evaluations(self) -> int:
        return 2 * self.schedule.num_timesteps - 1

    @table
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        alpha, sigma = np.sqrt(prev), np.sqrt(1 - prev)
        growth = np.zeros_like(abar)  # (exp(h) - 1) / 2; none at t = 0
        # logsnr falls with t, so h = -diff / 2 is positive.
        growth[1:] = np.expm1(-0.5 * np.diff(self.schedule.logsnr)) / 2
        return alpha, sigma, alpha * np.minimum(growth, 1.0)

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        c_x_0, c_eps, c_change = (extract(table, t, x_t.ndim) for table in self._tables)
        x_prev = c_x_0 * pred.x_0 + c_eps * pred.eps

        def corrected() -> Array:
            again = denoiser(x_prev, batch_t(t - 1, x_t))
            return x_prev + c_change * (again.x_0 - pred.x_0)

        # A `cond` on a scalar evaluates one branch only: no evaluation is wasted at t = 0.
        return jax.lax.cond(t > 0, corrected, lambda: x_prev), memory


def batch_t(t: Array, x_t: Array) -> Array:
    """A scalar t as int32 [b]."""
    return jnp.full(x_t.shape[:1], t, jnp.int32)
