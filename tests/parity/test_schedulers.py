"""Our schedules, losses and solvers against diffusers' schedulers, step for step."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from dalle2_jax.diffusion import gaussian, guidance, sample, schedules, solvers  # noqa: E402

pytestmark = pytest.mark.parity

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
    to_torch = lambda x: torch.tensor(np.moveaxis(np.float64(x), -1, 1))  # noqa: E731
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
    step = jax.jit(lambda state, ts, z: sample.advance(solver, denoiser, state, ts, None, noise=z))
    state = (jnp.asarray(x_T), solver.init(jnp.asarray(x_T)))
    out = []
    for i, t in enumerate(range(s.num_timesteps - 1, -1, -1)):
        state = step(state, np.array([t]), noise[i : i + 1])
        out.append(np.asarray(state[0]))
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


@pytest.mark.parametrize("name", list(OURS))
def test_tables(name: str) -> None:
    theirs = diffusers.DDPMScheduler(T, beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    np.testing.assert_allclose(theirs.betas, OURS[name].beta, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(theirs.alphas_cumprod, OURS[name].alpha_bar, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(OURS))
def test_q_sample_and_v(name: str) -> None:
    made = scheduler("DDPMScheduler", name)
    x_0, (noise, t) = drawn(0)[0], (drawn(1)[1][0], np.array([3, 700]))
    args = (torch.tensor(x_0), torch.tensor(noise), torch.tensor(t))
    np.testing.assert_allclose(
        gaussian.q_sample(OURS[name], x_0, t, noise), made.add_noise(*args), atol=TOLERANCE
    )
    np.testing.assert_allclose(
        gaussian.v_from(OURS[name], x_0, noise, t), made.get_velocity(*args), atol=TOLERANCE
    )


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(name: str, kind: str, variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler(
        "DDPMScheduler", name, prediction_type=KINDS[kind], variance_type=f"fixed_{variance}"
    )
    made.set_timesteps(50)
    s, (x_T, noise) = kept(made, name), drawn(50)
    ours = our_steps(
        solvers.DDPM(s, variance), s, network, x_T, noise, kind=kind, clip=("static", 1.0)
    )
    assert_steps_agree(ours, their_steps(made, network, x_T, noise, monkeypatch))


@pytest.mark.parametrize("name", list(OURS))
def test_ddpm_of_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler("DDPMScheduler", name)
    made.set_timesteps(T)
    s, (x_T, noise) = OURS[name], drawn(T)
    ours = our_steps(solvers.DDPM(s), s, network, x_T, noise, clip=("static", 1.0))
    assert_steps_agree(ours, their_steps(made, network, x_T, noise, monkeypatch))


@pytest.mark.parametrize("name", list(OURS))
def test_ddpm_with_learned_variance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler("DDPMScheduler", name, variance_type="learned_range")
    made.set_timesteps(50)
    s, (x_T, noise) = kept(made, name), drawn(50)
    ours = our_steps(solvers.DDPM(s), s, learned, x_T, noise, clip=("static", 1.0))
    assert_steps_agree(ours, their_steps(made, learned, x_T, noise, monkeypatch))


@pytest.mark.parametrize(
    ("variance_type", "kind", "net", "bound"),
    [("fixed_small_log", "x_0", network, 5.0), ("learned_range", "eps", learned, 1.0)],
)
def test_karlos_prior_and_decoder(
    variance_type: str, kind: str, net: Network, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scheduler(
        "UnCLIPScheduler",
        "squaredcos_cap_v2",
        variance_type=variance_type,
        prediction_type=KINDS[kind],
        clip_sample_range=bound,
    )
    made.set_timesteps(25)
    s, (x_T, noise) = schedules.respace(OURS["squaredcos_cap_v2"], 25), drawn(25)
    np.testing.assert_array_equal(s.timesteps[::-1], made.timesteps)
    ours = our_steps(solvers.DDPM(s), s, net, x_T, noise, kind=kind, clip=("static", bound))
    assert_steps_agree(ours, their_steps(made, net, x_T, noise, monkeypatch))


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(name: str, kind: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler("DDIMScheduler", name, prediction_type=KINDS[kind])
    made.set_timesteps(25)
    s, (x_T, noise) = kept(made, name), drawn(25)
    ours = our_steps(solvers.DDIM(s, eta), s, network, x_T, noise, kind=kind, clip=("static", 1.0))
    theirs = their_steps(
        made, network, x_T, noise, monkeypatch, eta=eta, use_clipped_model_output=True
    )
    assert_steps_agree(ours, theirs)


@pytest.mark.parametrize("name", list(OURS))
@pytest.mark.parametrize("kind", ["x_0", "v"])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(10, "linspace"), (25, "linspace"), (20, "trailing")]
)
def test_dpm_solver_2m(
    name: str, kind: str, steps: int, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scheduler(
        "DPMSolverMultistepScheduler",
        name,
        prediction_type=KINDS[kind],
        timestep_spacing=spacing,
        solver_order=2,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
    made.set_timesteps(steps)
    s, (x_T, noise) = kept(made, name), drawn(steps)
    if spacing == "trailing":
        ours_too = schedules.respace(OURS[name], steps, "trailing").timesteps
        np.testing.assert_array_equal(ours_too, s.timesteps)
    ours = our_steps(solvers.DPMSolverPP2M(s), s, network, x_T, noise, kind=kind)
    assert_steps_agree(ours, their_steps(made, network, x_T, noise, monkeypatch))


def test_dynamic_threshold() -> None:
    made = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0
    )
    x = 2 * drawn(0)[0]
    theirs = made._threshold_sample(torch.tensor(x))
    np.testing.assert_allclose(guidance.dynamic_threshold(x, 90.0), theirs, atol=TOLERANCE)
