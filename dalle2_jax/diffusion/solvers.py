"""One step of each solver, x_t at index t -> x_{t-1}, with abar(-1) = 1.

DDPM, ancestral (DDPM 2006.11239, algorithm 2):
    x_{t-1} = posterior mean(x_0, x_t) + exp(log variance / 2) noise, no noise at t = 0      (1)

DDIM (2010.02502, equations 12 and 16), eta = 0 deterministic, eta = 1 equal to DDPM:
    s       = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)              (2)
    x_{t-1} = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - s^2) eps + s noise                  (3)

DPM-Solver++(2M) (2211.01095, algorithm 2), with alpha = sqrt(abar), sigma = sqrt(1 - abar),
lambda = log(alpha / sigma), h_t = lambda_{t-1} - lambda_t, r = h_{t+1} / h_t:
    D       = (1 + 1/(2r)) x_0(t) - 1/(2r) x_0(t+1)                                          (4)
    x_{t-1} = sigma_{t-1} / sigma_t x_t + alpha_{t-1} (1 - exp(-h_t)) D                      (5)
The first step has no past and the last an infinite h: both are of first order, D = x_0(t).
Where steps grow more than twofold, 1/(2r) is held at 1: a spacing that ends in one long step
would extrapolate by tens. Steps even in logsnr (`respace(..., "logsnr")`) never come near that.

Coefficients are float64 tables over t. Each class is a `dalle2_jax.types.Solver`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.gaussian import q_posterior
from dalle2_jax.diffusion.schedules import Schedule, extract
from dalle2_jax.errors import UserError
from dalle2_jax.options import near_miss
from dalle2_jax.types import Array, Denoiser, PyTree, Solver


@dataclasses.dataclass(frozen=True, eq=False)
class DDPM:
    """Equation (1), with the learned variance where the denoiser gives one.

    Otherwise `variance` says which: "small" (beta~), "large" (beta), or a table [T] of one's own
    (Analytic-DPM's, for instance).
    """

    schedule: Schedule
    variance: str | np.ndarray = "small"

    def __post_init__(self) -> None:
        if isinstance(self.variance, str) and self.variance not in ("small", "large"):
            raise UserError(f"variance must be 'small' or 'large', not {self.variance!r}")

    @functools.cached_property
    def _log_variance(self) -> np.ndarray:
        if not isinstance(self.variance, str):
            return np.log(np.maximum(self.variance, 1e-20))
        if self.variance == "large":
            return np.log(self.schedule.beta)
        return self.schedule.posterior_log_variance_clipped

    def init(self, x_t: Array) -> PyTree:
        return ()

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        mean, _, _ = q_posterior(self.schedule, pred.x_0, x_t, t)
        log_variance = pred.log_variance
        if log_variance is None:
            log_variance = extract(self._log_variance, t, x_t.ndim)
        std = jnp.where(t > 0, jnp.exp(0.5 * log_variance), 0.0)
        return mean + std * noise, memory


@dataclasses.dataclass(frozen=True, eq=False)
class DDIM:
    """Equations (2) and (3)."""

    schedule: Schedule
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM's eta must be within 0 and 1, not {self.eta}")

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = self.eta * np.sqrt(self.schedule.posterior_variance)  # (2), for it is eta^2 beta~
        prev = self.schedule.alpha_bar_prev
        return np.sqrt(prev), np.sqrt(np.maximum(1 - prev - s**2, 0)), s

    def init(self, x_t: Array) -> PyTree:
        return ()

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        c_x_0, c_eps, c_noise = (extract(table, t, x_t.ndim) for table in self._tables)
        return c_x_0 * pred.x_0 + c_eps * pred.eps + c_noise * noise, memory


@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPP2M:
    """Equations (4) and (5); its memory is the last x_0. Deterministic, one call a step."""

    schedule: Schedule

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        lambda_ = 0.5 * self.schedule.logsnr
        h = np.append(np.inf, lambda_[:-1] - lambda_[1:])
        past = np.zeros_like(h)
        past[1:-1] = np.minimum(h[1:-1] / (2 * h[2:]), 1.0)  # 1/(2r); 0 at both ends
        c_x_t = np.sqrt((1 - prev) / (1 - abar))
        c_x_0 = -np.sqrt(prev) * np.expm1(-h)
        return c_x_t, c_x_0 * (1 + past), -c_x_0 * past

    def init(self, x_t: Array) -> PyTree:
        return jnp.zeros(x_t.shape, jnp.float32)

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        c_x_t, c_x_0, c_past = (extract(table, t, x_t.ndim) for table in self._tables)
        return c_x_t * x_t + c_x_0 * pred.x_0 + c_past * memory, pred.x_0


def batch_t(t: Array, x_t: Array) -> Array:
    """A scalar t as int32 [b]."""
    return jnp.full(x_t.shape[:1], t, jnp.int32)


_SOLVERS = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMSolverPP2M}
NAMES = tuple(_SOLVERS)


def check_name(name: str) -> None:
    """Raises UserError for an unknown solver, naming the near miss."""
    if not isinstance(name, str) or name not in _SOLVERS:
        raise UserError(f"unknown sampler {name!r}{near_miss(str(name).lower(), NAMES)}")


def make_solver(name: str, schedule: Schedule, **options: Any) -> Solver:
    """The solver of that name: "ddpm" (variance=), "ddim" (eta=) or "dpm++".

    Raises:
        UserError: an unknown name (the message names the near miss) or option.
    """
    check_name(name)
    known = [f.name for f in dataclasses.fields(_SOLVERS[name]) if f.name != "schedule"]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "no options"
            raise UserError(f"sampler {name!r} has no option {option!r}: it takes {takes}")
    return _SOLVERS[name](schedule, **options)
