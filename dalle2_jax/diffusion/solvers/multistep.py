"""Solvers that remember past predictions: x_t at index t -> x_{t-1}, one evaluation a step.

With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), h the step's
lambda_{t-1} - lambda_t, h_0 and h_1 those of the two steps before, m_i the x_0 predicted at t + i:

    phi_1   = 1 - exp(-h),  phi_2 = 1 - phi_1 / h,  phi_3 = 1/2 - phi_2 / h                  (1)

DPM-Solver++(2M) (2211.01095, algorithm 2):
    D       = m_0 + h / (2 h_0) (m_0 - m_1)                                                  (2)
    x_{t-1} = sigma_{t-1} / sigma_t x_t + alpha_{t-1} phi_1 D                                (3)

DPM-Solver++(3M), the same expansion one term longer, with h x_0' and h^2 x_0'' by differences:
    d_0     = h / h_0 (m_0 - m_1),  d_1 = h / h_1 (m_1 - m_2)                                (4)
    D_2     = 2 h / (h_0 + h_1) (d_0 - d_1),  D_1 = d_0 + h_0 / (2h) D_2                     (5)
    x_{t-1} = sigma_{t-1} / sigma_t x_t + alpha_{t-1} (phi_1 m_0 + phi_2 D_1 + phi_3 D_2)    (6)
The authors' program, and diffusers after it, put half of D_2 into phi_3's term; so it is of second
order only (`tests/test_diffusion_orders.py` measures ours).

SDE-DPM-Solver++(2M) (2211.01095, the reverse SDE in place of the ODE), with D of (2):
    x_{t-1} = sigma_{t-1} / sigma_t exp(-h) x_t + alpha_{t-1} (1 - exp(-2h)) D
              + sigma_{t-1} sqrt(1 - exp(-2h)) noise                                         (7)

UniPC-2 (2302.04867, algorithms 1 and 2, predicting x_0, B_2(h) = exp(h) - 1). Its predictor is
(3). Before that x_t is corrected by the network's prediction at x_t. In (8) and (9) h and h_0 are
those of the step that led to t and of the one before:
    x_t    <- sigma_t / sigma_{t+1} x_{t+1}
              + alpha_t phi_1 (m_1 + r_0 (m_0 - m_1) + r_1 h / h_0 (m_1 - m_2))              (8)
    r_1 + r_0 = phi_2 / phi_1,  r_0 - h_0 / h r_1 = 2 phi_3 / phi_1                          (9)
After the first step there is no m_2: r_1 = 0, r_0 = 1/2.

A step uses only what is remembered: a solver of third order takes a first step of first order, then
one of second (2). The last step, to sigma = 0, has an infinite h and is of first order, D = m_0.
Where steps grow more than twofold, the earlier one is taken to be half as long as the later one: a
spacing that ends in one long step would otherwise extrapolate by factors of ten and more. Steps
even in logsnr, which suit these solvers, never come near that.

Coefficients are float64 tables over t.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.schedules import extract
from dalle2_jax.diffusion.solvers.single import OverSchedule, batch_t
from dalle2_jax.diffusion.tables import table
from dalle2_jax.types import Array, Denoiser, PyTree

Tables = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPP2M(OverSchedule):
    """Equations (2) and (3). Deterministic.

    m_0     = x_0 of the network at x_t
    D       = m_0 + h / (2 h_0) (m_0 - m_1)         extrapolated to the middle of the step
    x_{t-1} = a x_t + b D
    remember m_0 as the next m_1
    """

    spacing: ClassVar[str] = "logsnr"

    @functools.cached_property
    def _h(self) -> np.ndarray:
        lambda_ = 0.5 * self.schedule.logsnr
        # h[t] is the length of the step that leaves t; the step before it in sampling is h[t + 1].
        # The step to the clean image is infinitely long: expm1(-inf) = -1 makes it exact.
        return np.append(np.inf, lambda_[:-1] - lambda_[1:])

    @functools.cached_property
    def _past(self) -> np.ndarray:
        """h / (2 h_0) of (2), held at 1; 0 at both ends."""
        # 0 at t = T - 1, which has no past, and at t = 0, which is of first order: D = m_0.
        h, past = self._h, np.zeros_like(self._h)
        past[1:-1] = np.minimum(h[1:-1] / (2 * h[2:]), 1.0)
        return past

    @table
    def _tables(self) -> Tables:
        """The coefficients of x_t, m_0, m_1, ..."""
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        c_x_t = np.sqrt((1 - prev) / (1 - abar))
        # alpha_{t-1} phi_1; at t = 0 it is 1 and c_x_t is 0, so x_{-1} is the prediction itself.
        c_x_0 = -np.sqrt(prev) * np.expm1(-self._h)
        # (2) sorted by m_0 and m_1: D = (1 + past) m_0 - past m_1.
        return c_x_t, c_x_0 * (1 + self._past), -c_x_0 * self._past

    def init(self, x_t: Array) -> PyTree:
        # One slot a past prediction: every table but those of x_t and m_0. The zeros are never
        # seen, since their coefficients are 0 until the slots are filled.
        return (jnp.zeros(x_t.shape, jnp.float32),) * (len(self._tables) - 2)

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        pred = denoiser(x_t, batch_t(t, x_t))
        terms = (x_t, pred.x_0, *memory)
        # terms is (x_t, m_0, m_1, ...): the next step knows m_0 as m_1, and so on.
        return combine(self._tables, t, terms), terms[1:-1]


@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPP3M(DPMSolverPP2M):
    """Equations (4) to (6). Deterministic.

    m_0     = x_0 of the network at x_t
    fit a parabola through m_0, m_1, m_2 over lambda
    x_{t-1} = a x_t + the exact integral of that parabola over the step
    remember m_0, m_1 as the next m_1, m_2
    """

    @table
    def _tables(self) -> Tables:
        # Rows t = 1 .. T - 3 are of third order. The others keep those of 2M: at the beginning too
        # little is remembered, and the last step is of first order.
        c_x_t, *second = super()._tables
        h, h_0, h_1 = self._h[1:-2], self._h[2:-1], self._h[3:]
        # No past step counts as shorter than half the one after it, as in `_past`.
        h_0 = np.maximum(h_0, h / 2)
        h_1 = np.maximum(h_1, h_0 / 2)
        phi_1, phi_2, phi_3 = _phis(h)
        # what multiplies d_0 - d_1 in (6), and what d_0 and d_1 are made of
        c_d = (phi_2 * h_0 / (2 * h) + phi_3) * 2 * h / (h_0 + h_1)
        d_0, d_1 = h / h_0, h / h_1
        third = (
            phi_1 + (phi_2 + c_d) * d_0,
            -(phi_2 + c_d) * d_0 - c_d * d_1,
            c_d * d_1,
        )
        # Filling in place is safe: 2M's tables were made for this call, nobody else has them.
        tables = c_x_t, *second, np.zeros_like(c_x_t)
        for values, c in zip(tables[1:], third, strict=True):
            values[1:-2] = np.sqrt(self.schedule.alpha_bar_prev[1:-2]) * c
        return tables


@dataclasses.dataclass(frozen=True, eq=False)
class DPMSolverPPSDE(DPMSolverPP2M):
    """Equations (2) and (7): the reverse SDE, with noise in every step as DDPM.

    D       = m_0 + h / (2 h_0) (m_0 - m_1), as 2M
    x_{t-1} = a exp(-h) x_t + b D + s noise         forgets x_t faster, makes up for it by noise
    """

    @table
    def _tables(self) -> Tables:
        abar, prev = self.schedule.alpha_bar, self.schedule.alpha_bar_prev
        c_x_t = np.sqrt((1 - prev) / (1 - abar)) * np.exp(-self._h)
        c_x_0 = -np.sqrt(prev) * np.expm1(-2 * self._h)
        return c_x_t, c_x_0 * (1 + self._past), -c_x_0 * self._past

    @table
    def _std(self) -> np.ndarray:
        return np.sqrt(-(1 - self.schedule.alpha_bar_prev) * np.expm1(-2 * self._h))

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        mean, memory = super().step(denoiser, x_t, t, noise, memory)
        return mean + extract(self._std, t, x_t.ndim) * noise, memory


@dataclasses.dataclass(frozen=True, eq=False)
class UniPC(DPMSolverPP2M):
    """Equations (8) and (3). Deterministic; remembers the corrected x_{t+1}, m_1 and m_2.

    m_0     = x_0 of the network at x_t             the step's only evaluation
    x_t     = corrected from x_{t+1} with m_0       the step that led here, taken again
    x_{t-1} = 2M's step from the corrected x_t
    remember x_t, m_0, m_1
    """

    @table
    def _corrector(self) -> Tables:
        """The coefficients of x_t, x_{t+1}, m_0, m_1, m_2; before the first step x_t stays."""
        s, h = self.schedule, self._h[1:]
        # Entry t of these is about the step t + 1 -> t, which is taken again. The first has no step
        # before it: h_0 = inf makes r_1 vanish, and the paper then sets r_0 = 1/2.
        h_0 = np.maximum(np.append(h[1:], np.inf)[: len(h)], h / 2)
        phi_1, phi_2, phi_3 = _phis(h)
        r_1 = (phi_2 - 2 * phi_3) / phi_1 / (1 + h_0 / h)
        r_0 = phi_2 / phi_1 - r_1
        r_0[-1:] = 0.5
        c_x = np.sqrt((1 - s.alpha_bar[:-1]) / (1 - s.alpha_bar[1:]))  # sigma_t / sigma_{t+1}
        c, c_2 = s.sqrt_alpha_bar[:-1] * phi_1, r_1 * h / h_0
        # (8) sorted by terms. x_t itself has weight 0, for the corrected one replaces it; only at
        # t = T - 1, appended below, it is 1 and all else 0.
        rows = (np.zeros_like(c), c_x, c * r_0, c * (1 - r_0 + c_2), -c * c_2)
        return tuple(np.append(row, float(i == 0)) for i, row in enumerate(rows))

    def init(self, x_t: Array) -> PyTree:
        return (jnp.zeros(x_t.shape, jnp.float32),) * 3

    def step(
        self, denoiser: Denoiser, x_t: Array, t: Array, noise: Array, memory: PyTree
    ) -> tuple[Array, PyTree]:
        last, m_1, m_2 = memory
        m_0 = denoiser(x_t, batch_t(t, x_t)).x_0
        # m_0 was predicted at the uncorrected x_t and serves the corrected one as well, which
        # keeps UniPC at one evaluation a step.
        x_t = combine(self._corrector, t, (x_t, last, m_0, m_1, m_2))
        return combine(self._tables, t, (x_t, m_0, m_1)), (x_t, m_0, m_1)


def _phis(h: np.ndarray) -> Tables:
    """Equation (1)."""
    # phi_2 and phi_3 cancel for small h; float64 leaves digits enough at the steps of sampling.
    phi_1 = -np.expm1(-h)
    phi_2 = 1 - phi_1 / h
    return phi_1, phi_2, 0.5 - phi_2 / h


def combine(tables: Tables, t: Array, terms: tuple[Array, ...]) -> Array:
    """The sum of the terms [b, ...], each by its table's entry t."""
    first, *rest = (
        extract(table, t, term.ndim) * term for table, term in zip(tables, terms, strict=True)
    )
    return functools.reduce(jnp.add, rest, first)
