"""Both sides' loops, step by step: a scheduler of diffusers and a solver of ours."""

import sys
from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dalle2_jax.diffusion import sample, schedules, solvers

T, SHAPE, TOLERANCE = 1000, (2, 4, 4, 3), 1e-5
OURS = {"squaredcos_cap_v2": schedules.cosine(T), "linear": schedules.linear(T)}
KINDS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
Network = Callable[[np.ndarray, int], np.ndarray]


def scheduler(cls: str, name: str, **options: object):
    """A scheduler of theirs in float64.

    Its own tables are float32, where 1 - abar loses four digits at t = 0: with ours the
    comparison is of equations and not of rounding (the tables have a test of their own).
    """
    if cls != "UnCLIPScheduler":
        options |= {"beta_start": 1e-4, "beta_end": 0.02}
    made = getattr(diffusers, cls)(num_train_timesteps=T, beta_schedule=name, **options)
    made.betas, made.alphas, made.alphas_cumprod = (
        torch.tensor(getattr(OURS[name], table)) for table in ("beta", "alpha", "alpha_bar")
    )
    return made


def network(x_t: np.ndarray, t: int) -> np.ndarray:
    """Any smooth function will do that both sides see alike."""
    return np.tanh(x_t) * (0.3 + t / (2 * T))


def learned(x_t: np.ndarray, t: int) -> np.ndarray:
    return np.concatenate([network(x_t, t), np.sin(3 * x_t)], axis=-1)


def their_steps(
    made, net: Network, x_T: np.ndarray, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, **kw
) -> list[np.ndarray]:
    """Every x_{t-1} of their loop, with our noise for what they would draw; NHWC."""

    def to_torch(x):
        return torch.tensor(np.moveaxis(np.float64(x), -1, 1))

    timesteps = [int(t) for t in made.timesteps]
    x, out = np.float64(x_T), []
    for i, t in enumerate(timesteps):
        z = to_torch(noise[i])
        if hasattr(sys.modules[made.__module__], "randn_tensor"):
            monkeypatch.setattr(
                sys.modules[made.__module__], "randn_tensor", lambda *a, z=z, **k: z.clone()
            )
        if isinstance(made, diffusers.UnCLIPScheduler):
            kw["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
        step = made.step(to_torch(net(x, t)), t, to_torch(x), **kw).prev_sample
        x = np.moveaxis(step.numpy(), 1, -1)
        out.append(x)
    return out


def our_steps(
    solver: solvers.Solver,
    s: schedules.Schedule,
    net: Network,
    x_T: np.ndarray,
    noise: np.ndarray,
    **kw,
) -> list[np.ndarray]:
    def apply(x_t: jax.Array, t: jax.Array) -> jax.Array:
        assert x_t.dtype == jnp.float32
        mean = jnp.tanh(x_t) * (0.3 + t / (2 * T))[:, None, None, None]
        return mean if net is network else jnp.concatenate([mean, jnp.sin(3 * x_t)], axis=-1)

    denoiser = sample.denoiser_from(s, apply, learned_variance=net is learned, **kw)
    step = jax.jit(lambda state, t, z: sample.take_step(solver, denoiser, state, t, None, z))
    state = sample.begin(solver, jnp.asarray(x_T))
    out = []
    for i, t in enumerate(range(s.num_timesteps - 1, -1, -1)):
        state = step(state, t, noise[i])
        out.append(np.asarray(state.x_t))
    return out


def drawn(steps: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal(SHAPE, dtype=np.float32),
        rng.standard_normal((steps, *SHAPE), dtype=np.float32),
    )


def assert_steps_agree(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.abs(ours[-1]).max() < 100  # a comparison of things that have not blown up


def kept(made, name: str) -> schedules.Schedule:
    return schedules.respace(OURS[name], made.timesteps.numpy().tolist())
