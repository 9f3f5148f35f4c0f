"""q(x_t | x_0), its posterior, and conversions between the predictions of a network.

A diffusion model is trained to undo noise. Its forward process needs no network: x_t is x_0,
shrunk, plus Gaussian noise, and the schedule says how much of each is left at time t:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   eps ~ N(0, I)

abar_t falls from nearly 1 (all signal) to nearly 0 (all noise), so that x_T can be sampled without
knowing x_0. Because the variances add up to 1, data of unit variance keep it at every t.

Given x_t, each of x_0, eps and v determines the other two: there is one equation between them and
two unknowns. So it does not matter to a solver which of them the network predicts; it matters to
training, because the loss weighs them differently: an error in eps counts most where x_t is nearly
clean, one in x_0 where it is nearly noise; v = sqrt(abar) eps - sqrt(1 - abar) x_0 is in between
and well-behaved at both ends. `to_prediction` turns any of them into a consistent (x_0, eps).

Going backwards, x_{t-1} given x_t and x_0 is Gaussian again, with a mean between the two (the
posterior, `q_posterior`). Putting the network's x_0 into it gives DDPM's ancestral step. Its
variance lies between beta~ (if x_0 is known exactly) and beta (if nothing is known of it); a
network may learn where between, as a fraction of the two on a log scale (7).

    x_t   = sqrt(abar) x_0 + sqrt(1 - abar) eps                                              (1)
    x_0   = (x_t - sqrt(1 - abar) eps) / sqrt(abar)                                          (2)
    eps   = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)                                          (3)
    v     = sqrt(abar) eps - sqrt(1 - abar) x_0                                              (4)
    x_0   = sqrt(abar) x_t - sqrt(1 - abar) v                                                (5)
    eps   = sqrt(1 - abar) x_t + sqrt(abar) v                                                (6)
    log Sigma = f log beta + (1 - f) log beta~,  f = (raw + 1) / 2                           (7)

Sources: DDPM (2006.11239) for (1)-(3); progressive distillation (2202.00512) section 4 and
appendix D for (4)-(6); IDDPM (2102.09672) section 3.1 for (7).

Every x is [b, ...], images NHWC or vectors; t is int, a scalar or [b]. Results are float32.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dalle2_jax.diffusion.guidance import threshold
from dalle2_jax.diffusion.schedules import Schedule, extract
from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, Prediction

Clip = tuple[str, Any] | None
KINDS = ("eps", "x_0", "v")


def _signal_noise(schedule: Schedule, t: Array, ndim: int) -> tuple[Array, Array]:
    return (
        extract(schedule.sqrt_alpha_bar, t, ndim),
        extract(schedule.sqrt_one_minus_alpha_bar, t, ndim),
    )


def q_sample(schedule: Schedule, x_0: Array, t: Array, noise: Array) -> Array:
    """x_t by equation (1)."""
    signal, sigma = _signal_noise(schedule, t, x_0.ndim)
    return signal * x_0 + sigma * noise


def q_posterior(schedule: Schedule, x_0: Array, x_t: Array, t: Array) -> tuple[Array, Array, Array]:
    """(mean [b, ...], variance, log variance) of q(x_{t-1} | x_t, x_0).

    The variances broadcast against x. At t = 0 the variance is 0 and its log that of t = 1.
    """
    n = x_t.ndim
    mean = (
        extract(schedule.posterior_mean_coef_x_0, t, n) * x_0
        + extract(schedule.posterior_mean_coef_x_t, t, n) * x_t
    )
    variance = extract(schedule.posterior_variance, t, n)
    return mean, variance, extract(schedule.posterior_log_variance_clipped, t, n)


def x_0_from_eps(schedule: Schedule, x_t: Array, eps: Array, t: Array) -> Array:
    """Equation (2)."""
    signal, sigma = _signal_noise(schedule, t, x_t.ndim)
    # Near t = T - 1 signal is tiny and magnifies errors in eps: `clip` keeps x_0 within bounds.
    return (x_t - sigma * eps) / signal


def eps_from_x_0(schedule: Schedule, x_t: Array, x_0: Array, t: Array) -> Array:
    """Equation (3)."""
    signal, sigma = _signal_noise(schedule, t, x_t.ndim)
    # sigma is small at t = 0 but never 0.
    return (x_t - signal * x_0) / sigma


def v_from(schedule: Schedule, x_0: Array, eps: Array, t: Array) -> Array:
    """Equation (4)."""
    signal, sigma = _signal_noise(schedule, t, x_0.ndim)
    return signal * eps - sigma * x_0


def x_0_from_v(schedule: Schedule, x_t: Array, v: Array, t: Array) -> Array:
    """Equation (5)."""
    signal, sigma = _signal_noise(schedule, t, x_t.ndim)
    return signal * x_t - sigma * v


def eps_from_v(schedule: Schedule, x_t: Array, v: Array, t: Array) -> Array:
    """Equation (6)."""
    signal, sigma = _signal_noise(schedule, t, x_t.ndim)
    return sigma * x_t + signal * v


def learned_log_variance(schedule: Schedule, raw: Array, t: Array) -> Array:
    """Equation (7): the raw output [b, ...], usually in [-1, 1] -> log variance."""
    low = extract(schedule.posterior_log_variance_clipped, t, raw.ndim)
    high = extract(schedule.log_beta, t, raw.ndim)
    fraction = (raw.astype(jnp.float32) + 1) / 2
    return fraction * high + (1 - fraction) * low


def check_kind(kind: str) -> None:
    """Raises UserError unless a network can predict this: "eps", "x_0" or "v"."""
    if kind not in KINDS:
        raise UserError(f"prediction must be one of {', '.join(KINDS)}, not {kind!r}")


def to_prediction(
    schedule: Schedule,
    kind: str,
    out: Array,
    x_t: Array,
    t: Array,
    clip: Clip = None,
    learned_variance: bool = False,
) -> Prediction:
    """Converts a network's raw output to x_0, eps and, if learned, the log variance.

    Args:
        schedule: the schedule that t indexes.
        kind: the predicted quantity, "eps", "x_0" or "v".
        out: [b, ...] like x_t; with learned_variance its last axis is twice as wide and the second
            half goes through equation (7).
        x_t: [b, ...].
        t: a scalar or [b], index into `schedule`.
        clip: None, ("static", bound) or ("dynamic", percentile), applied to x_0; eps is then
            recomputed by (3), so that the two still agree with x_t.
        learned_variance: see `out`.

    Raises:
        UserError: an unknown kind, or an output whose shape does not fit x_t.
    """
    check_kind(kind)
    # Config and network may disagree: say so here, rather than in a failed broadcast below.
    width = x_t.shape[-1] * (2 if learned_variance else 1)
    if out.shape != (*x_t.shape[:-1], width):
        raise UserError(
            f"the network gave {out.shape} for x_t {x_t.shape}: with "
            f"learned_variance={learned_variance} its last axis must be {width}"
        )
    out, x_t = out.astype(jnp.float32), x_t.astype(jnp.float32)
    log_variance = None
    if learned_variance:
        out, raw = jnp.split(out, 2, axis=-1)
        log_variance = learned_log_variance(schedule, raw, t)
    if kind == "eps":
        x_0, eps = x_0_from_eps(schedule, x_t, out, t), out
    elif kind == "x_0":
        x_0, eps = out, eps_from_x_0(schedule, x_t, out, t)
    else:
        # v gives both without a division, hence is well-behaved at both ends.
        x_0, eps = x_0_from_v(schedule, x_t, out, t), eps_from_v(schedule, x_t, out, t)
    if clip is not None:
        # DDIM and Heun move along eps. That of the unclipped x_0 would contradict the clipped one.
        x_0 = threshold(x_0, clip)
        eps = eps_from_x_0(schedule, x_t, x_0, t)
    return Prediction(x_0=x_0, eps=eps, log_variance=log_variance)
