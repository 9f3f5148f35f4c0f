"""Noise schedules as float64 tables, cast to float32 once, where they meet x.

With abar(t) = prod_{s<=t} (1 - beta(s)) and abar(-1) = 1, for t = 0 .. T-1:

    q(x_t | x_0)          = N(sqrt(abar) x_0, (1 - abar) I)                                  (1)
    beta                  = 1 - abar / abar_prev                                             (2)
    q(x_{t-1}|x_t, x_0)   = N(c_0 x_0 + c_t x_t, beta~ I)                                    (3)
      beta~               = beta (1 - abar_prev) / (1 - abar)                                (4)
      c_0                 = beta sqrt(abar_prev) / (1 - abar)                                (5)
      c_t                 = (1 - abar_prev) sqrt(1 - beta) / (1 - abar)                      (6)
    logsnr                = log(abar / (1 - abar))                                           (7)
    cosine: abar(t) = f(t+1) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 * pi/2)              (8)
    linear: beta from 1e-4 to 0.02 over 1000 steps, scaled by 1000/T for other T             (9)

Sources: DDPM (2006.11239) section 2 for (1)-(6), (9); IDDPM (2102.09672) section 3.2 for (8),
section 4 for respacing; trailing steps: 2305.08891 section 3.3; even steps of lambda = logsnr / 2:
DPM-Solver (2206.00927) section 3.4, down to its -5.1, where x_t is all but pure noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.tables import table
from dalle2_jax.errors import UserError, near_miss

MIN_LAMBDA = -5.1  # of the "logsnr" spacing: below it x_t is all but pure noise
MAX_BETA = 0.999  # IDDPM section 3.2: keeps the last steps of (8) away from a singularity


# Tables are computed once, in float64, and cast where they meet x. In float32 1 - abar would lose
# its digits at the clean end, where abar is nearly 1, and so would the ratios (4) to (6).
#
# `table` marks those that a compiled step reads (see `tables`); the other cached properties only
# serve to make tables.
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule: `alpha_bar` float64 [T], falling from nearly 1 to nearly 0.

    `timesteps` int [T] are the indices of the training schedule that are kept here; arange(T)
    unless the schedule was respaced. Compared and hashed by identity, so it may be a static
    argument of `jax.jit`. Every derived table is float64 [T].
    """

    alpha_bar: np.ndarray
    timesteps: np.ndarray

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:
        # abar(-1) = 1: the last step, at t = 0, leads to the clean image itself.
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        return self.alpha_bar / self.alpha_bar_prev

    @functools.cached_property
    def beta(self) -> np.ndarray:
        return 1.0 - self.alpha  # (2)

    @table
    def log_beta(self) -> np.ndarray:
        return np.log(self.beta)

    @table
    def sqrt_alpha_bar(self) -> np.ndarray:
        return np.sqrt(self.alpha_bar)

    @table
    def sqrt_one_minus_alpha_bar(self) -> np.ndarray:
        return np.sqrt(1.0 - self.alpha_bar)

    @table
    def posterior_variance(self) -> np.ndarray:
        return self.beta * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)  # (4)

    @table
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log beta~ with its first entry, log 0, replaced by the second (IDDPM)."""
        # There is no second entry to borrow; the last step adds no noise anyway.
        if self.num_timesteps == 1:
            return np.log(self.beta)
        # beta~ is 0 at t = 0, because abar_prev is 1. Its log must stay finite even where it is not
        # used: an infinity in a branch that `jnp.where` drops still makes the gradient NaN.
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @table
    def posterior_mean_coef_x_0(self) -> np.ndarray:
        return self.beta * np.sqrt(self.alpha_bar_prev) / (1.0 - self.alpha_bar)  # (5)

    @table
    def posterior_mean_coef_x_t(self) -> np.ndarray:
        return (1.0 - self.alpha_bar_prev) * np.sqrt(self.alpha) / (1.0 - self.alpha_bar)  # (6)

    @functools.cached_property
    def logsnr(self) -> np.ndarray:
        # log1p keeps the digits of 1 - abar where abar is tiny.
        return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)  # (7)


def extract(table: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """table[t] as float32, shaped to broadcast against an array of rank `ndim`.

    Args:
        table: float64 [T].
        t: int, a scalar or [b].
        ndim: rank of the array that the result will multiply.

    Returns:
        float32 [1, 1, ...] for a scalar t, [b, 1, ...] for a batch of them.
    """
    # A table of a running program is a traced float32 array already (`tables.with_tables`).
    t = jnp.asarray(t)
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(t.shape + (1,) * (ndim - t.ndim))


def _from_betas(beta: np.ndarray) -> Schedule:
    # alpha_bar is multiplied up again from the clipped betas, so that all tables agree.
    beta = np.minimum(beta, MAX_BETA)
    return Schedule(alpha_bar=np.cumprod(1.0 - beta), timesteps=np.arange(len(beta)))


def cosine(num_timesteps: int) -> Schedule:
    """IDDPM's cosine schedule, equation (8), betas clipped at 0.999."""
    t = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    # T + 1 points, t / T = 0 .. 1: beta(t) is the fall from one to the next.
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return _from_betas(1.0 - f[1:] / f[:-1])


def linear(num_timesteps: int) -> Schedule:
    """DDPM's linear schedule, equation (9), scaled as in IDDPM and ADM."""
    # With fewer steps each is as much noisier, so that x_T is about the same noise.
    scale = 1000.0 / num_timesteps
    return _from_betas(np.linspace(scale * 1e-4, scale * 0.02, num_timesteps))


SPACINGS = ("even", "trailing", "logsnr", "sections", "fast27")
# Steps in each fifth of time, the cleanest first, as `_in_sections` takes them.
_FAST27 = 10, 10, 3, 2, 2
_MAKERS = {"cosine": cosine, "linear": linear}


def make(name: str, num_timesteps: int) -> Schedule:
    """The schedule of that name, "cosine" or "linear".

    Raises:
        UserError: an unknown name (the message names the near miss), or num_timesteps below 1 or
          above 100,000, to bound the tables.
    """
    if name not in _MAKERS:
        raise UserError(f"unknown noise schedule {name!r}{near_miss(str(name), _MAKERS)}")
    if type(num_timesteps) is not int or not 1 <= num_timesteps <= 100_000:
        raise UserError(
            f"num_timesteps must be a whole number from 1 to 100000, not {num_timesteps!r}"
        )
    return _MAKERS[name](num_timesteps)


def respace(schedule: Schedule, steps: int | Sequence[int], spacing: str = "even") -> Schedule:
    """A shorter schedule through some of the points of `schedule` (IDDPM section 4).

    The kept alpha_bar stay as they are and the betas between them are recomputed by (2);
    `timesteps` of the result holds the t that the network is called with.

    Args:
        schedule: the schedule to thin out, itself respaced or not.
        steps: how many steps to keep; or, as a sequence, which indices; or, with
            spacing="sections", how many in each of len(steps) equal parts of time, from the
            cleanest to the noisiest.
        spacing: of a number of steps, keeping the last and noisiest:
            "even": strided, the first step kept too; the usual choice for DDPM and DDIM;
            "trailing": strided from the end, so that the last jump is no longer than others;
            "logsnr": even in logsnr, the first kept too; the choice for DPM-Solver++. With "even"
            the last step is by far the longest in logsnr, which suits that solver badly;
            "fast27": GLIDE's 27 steps for its upsampler, 10, 10, 3, 2 and 2 in "sections", the
            noisiest at T - 3 in place of T - 1;
            or "sections", see `steps`.

    Raises:
        UserError: more steps than there are, an index out of range or twice, or a bad spacing.
    """
    total = schedule.num_timesteps
    if spacing not in SPACINGS:
        raise UserError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    if isinstance(steps, int | np.integer):
        indices = _indices_by_spacing(schedule, int(steps), spacing)
    elif spacing == "sections":
        indices = _in_sections(total, steps)
    else:
        indices = np.sort(np.asarray(steps, np.int64))
    if (
        len(indices) == 0
        or len(np.unique(indices)) < len(indices)
        or indices[0] < 0
        or indices[-1] >= total
    ):
        raise UserError(f"steps to keep must be distinct and within 0..{total - 1}: {steps}")
    # Indexing `timesteps` too keeps them those of training, even if this schedule was respaced.
    return Schedule(alpha_bar=schedule.alpha_bar[indices], timesteps=schedule.timesteps[indices])


def _indices_by_spacing(schedule: Schedule, count: int, spacing: str) -> np.ndarray:
    total = schedule.num_timesteps
    if spacing == "sections":
        raise UserError(f"spacing 'sections' takes a count for each section, not {count}")
    if spacing == "fast27":
        if count != sum(_FAST27):
            raise UserError(f"spacing 'fast27' has {sum(_FAST27)} steps, not {count}")
        return np.append(_in_sections(total, _FAST27)[:-1], total - 3)
    # Called for every spacing, since it also checks the count.
    strided = _strided(total, count)
    if spacing == "trailing":
        return np.ceil(np.arange(1, count + 1) * total / count).astype(np.int64) - 1
    if spacing == "even" or count == 1:
        return strided
    lambda_ = 0.5 * schedule.logsnr
    # For each target the nearest t: [1, T] against [count, 1]. The last must be T - 1, because
    # sampling starts from pure noise.
    targets = np.linspace(lambda_[0], max(lambda_[-1], MIN_LAMBDA), count)
    indices = np.abs(lambda_[None, :] - targets[:, None]).argmin(1)
    indices[-1] = total - 1
    # Where time is coarser than the targets, neighbours collide: move them apart. If
    # indices - first never falls, indices rise by at least 1. The minimum leaves room for the rest.
    first = np.arange(count)
    indices = np.maximum.accumulate(indices - first) + first
    return np.minimum(indices, total - count + first)


def _in_sections(total: int, counts: Sequence[int]) -> np.ndarray:
    # Of an uneven division the first parts take the rest, one step each (as in IDDPM's code).
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [s + _strided(n, k) for s, n, k in zip(starts, sizes, counts, strict=True)]
    return np.concatenate(parts)


def _strided(total: int, count: int) -> np.ndarray:
    if not 1 <= count <= total:
        raise UserError(f"cannot keep {count} of {total} steps: ask for 1 to {total}")
    if count == 1:
        return np.array([total - 1])  # sampling starts from pure noise
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)
