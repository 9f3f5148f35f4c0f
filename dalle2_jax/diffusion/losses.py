"""Training losses of a diffusion model, each [b], in float32.

    L_simple = mean (target - out)^2, target eps, x_0 or v                                   (1)
    L_t      = KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)) for t > 0                            (2)
    L_0      = -log p(x_0|x_1), a gaussian integrated over a pixel's bin, 2/255 wide           (3)
    L_hybrid = L_simple + lambda T L_t, the mean in L_t under a stop-gradient                (4)
    min-SNR: L_simple on x_0 weighted by min(snr, gamma), for eps and v the same loss
             written on x_0: / snr and / (snr + 1)                                           (5)
    min-v:   the same with min(snr + 1, gamma): L_simple on v, bounded where it is large     (6)

(2) and (3) in bits per dimension. lambda = 0.001, and the factor T makes one sampled term an
estimate of the whole sum L_vlb.

Sources: DDPM (2006.11239) sections 3.3-3.4 for (1), (3); IDDPM (2102.09672) section 3.1 for (4);
min-SNR (2303.09556) section 3.4 for (5); 2202.00512 section 4 for v's snr + 1 of (6), which unlike
(5) leaves its weight to x_0 where noise is all there is.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import gaussian
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.diffusion.schedules import Schedule, extract
from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, Prediction


def sample_t(key: Array, b: int, num_timesteps: int, stratified: bool = False) -> Array:
    """t int32 [b], uniform over 0 .. T-1.

    With `stratified` the b samples are one offset plus equal strides, in random order: each t is
    still uniform, but a batch covers time evenly and its mean loss varies less.
    """
    if not stratified:
        return jax.random.randint(key, (b,), 0, num_timesteps)
    offset, order = jax.random.split(key)
    # [b], 1 / b apart. In float32 u T may round up to T, hence the minimum.
    u = (jnp.arange(b) / b + jax.random.uniform(offset)) % 1.0
    t = jnp.minimum(u * num_timesteps, num_timesteps - 1).astype(jnp.int32)
    # Shuffled, so that the place of an example in the batch says nothing about its t.
    return jax.random.permutation(order, t)


def loss_weight(schedule: Schedule, kind: str, weighting: str) -> np.ndarray:
    """The weight of L_simple at each t, float64 [T].

    `weighting`: "none", "min_snr_<gamma>" as in (5) or "min_v_<gamma>" as in (6).
    """
    if weighting == "none":
        return np.ones(schedule.num_timesteps)
    snr = np.exp(schedule.logsnr)
    of_x_0 = {"min_snr": snr, "min_v": snr + 1}
    name, _, gamma = weighting.rpartition("_")
    number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", gamma)
    if name not in of_x_0 or not number or not float(gamma):
        raise UserError(
            "weighting must be 'none', 'min_snr_<gamma>' or 'min_v_<gamma>', gamma above 0, "
            f"not {weighting!r}"
        )
    # At a given x_t an error e in x_0 is one of e sqrt(snr) in eps and of e sqrt(snr + 1) in v. So
    # dividing by snr or snr + 1 turns their squares into the square of the error in x_0.
    return np.minimum(of_x_0[name], float(gamma)) / {"x_0": 1.0, "eps": snr, "v": snr + 1}[kind]


def training_losses(
    schedule: Schedule,
    apply: Apply,
    x_0: Array,
    t: Array,
    noise: Array,
    kind: str = "eps",
    learned_variance: bool = False,
    vlb_weight: float = 0.001,
    weighting: str = "none",
) -> dict[str, Array]:
    """The loss of each example at its t.

    Args:
        schedule: the training schedule.
        apply: (x_t, t) -> raw output, its last axis doubled if the variance is learned.
        x_0: [b, ...]; images in [-1, 1] if the variance is learned.
        t: int [b].
        noise: standard normal, like x_0.
        kind: what the network predicts, "eps", "x_0" or "v".
        weighting: see `loss_weight`; weights L_simple only.

    Returns:
        `loss` [b], `mse` [b] (unweighted) and, if the variance is learned, `vb` [b] in bits per
        dimension: L_t of (2) or (3), unweighted.
    """
    x_0, noise = x_0.astype(jnp.float32), noise.astype(jnp.float32)
    x_t = gaussian.q_sample(schedule, x_0, t, noise)
    out = apply(x_t, t).astype(jnp.float32)
    # Read by `vb_term` alone. Unclipped, for the bound is that of the network's own prediction.
    prediction = gaussian.to_prediction(
        schedule, kind, _stop_mean(out) if learned_variance else out, x_t, t, None, learned_variance
    )
    mean_out = jnp.split(out, 2, axis=-1)[0] if learned_variance else out
    if kind == "v":
        target = gaussian.v_from(schedule, x_0, noise, t)
    else:
        target = noise if kind == "eps" else x_0
    mse = _mean_flat(jnp.square(mean_out - target))  # b
    weight = extract(loss_weight(schedule, kind, weighting), t, 1)
    if not learned_variance:
        return {"loss": weight * mse, "mse": mse}
    vb = vb_term(schedule, prediction, x_0, x_t, t)
    loss = weight * mse + vlb_weight * schedule.num_timesteps * vb  # (4)
    return {"loss": loss, "mse": mse, "vb": vb}


# L_t trains the variance only; L_simple alone decides the mean (IDDPM section 3.1).
def _stop_mean(out: Array) -> Array:
    mean, raw = jnp.split(out, 2, axis=-1)
    return jnp.concatenate([jax.lax.stop_gradient(mean), raw], axis=-1)


def vb_term(schedule: Schedule, prediction: Prediction, x_0: Array, x_t: Array, t: Array) -> Array:
    """L_t of (2), L_0 of (3) where t = 0, in bits per dimension, [b].

    Without a learned variance p has that of the posterior, beta~.
    """
    mean, _, log_variance = gaussian.q_posterior(schedule, x_0, x_t, t)
    mean_pred, _, log_variance_pred = gaussian.q_posterior(schedule, prediction.x_0, x_t, t)
    if prediction.log_variance is not None:
        log_variance_pred = prediction.log_variance
    # Both terms are computed for every t, and each is finite where the other is chosen: clipped log
    # variances in the first, the bound 1e-12 in the second.
    kl = _mean_flat(normal_kl(mean, log_variance, mean_pred, log_variance_pred))
    nll = -_mean_flat(discretised_log_likelihood(x_0, mean_pred, log_variance_pred))
    return jnp.where(t == 0, nll, kl) / np.log(2.0)


def normal_kl(mean_1: Array, log_variance_1: Array, mean_2: Array, log_variance_2: Array) -> Array:
    """KL(N_1 || N_2) of diagonal gaussians in nats, elementwise."""
    difference = log_variance_1 - log_variance_2
    squared = jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
    # expm1(d) - d = exp(d) - 1 - d, precise also where the variances are nearly equal.
    return 0.5 * (jnp.expm1(difference) - difference + squared)


def discretised_log_likelihood(x: Array, mean: Array, log_variance: Array) -> Array:
    """log probability, in nats, that N(mean, variance) puts on the bin of x, elementwise.

    x holds uint8 values rescaled to [-1, 1]; the outer bins reach to infinity. Probabilities
    below 1e-12 count as 1e-12, which bounds the loss and the gradient of a hopeless guess.
    """
    inverse_std = jnp.exp(-0.5 * log_variance)
    # Values are 2 / 255 apart in [-1, 1]: a bin reaches half of that to either side.
    upper = jnp.where(x > 0.999, jnp.inf, (x - mean + 1 / 255) * inverse_std)
    lower = jnp.where(x < -0.999, -jnp.inf, (x - mean - 1 / 255) * inverse_std)
    # Mirrored into the lower tail: there float32 tells small probabilities apart, whereas those
    # near 1 all round to 1.
    mirror = x > mean
    upper, lower = jnp.where(mirror, -lower, upper), jnp.where(mirror, -upper, lower)
    cdf = jax.scipy.special.ndtr
    return jnp.log(jnp.maximum(cdf(upper) - cdf(lower), 1e-12))


def _mean_flat(x: Array) -> Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
