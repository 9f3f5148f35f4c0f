"""Our schedules, losses and solvers against diffusers' schedulers, step for step."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from stepping import (  # noqa: E402
    KINDS,
    OURS,
    TOLERANCE,
    Network,
    T,
    assert_steps_agree,
    drawn,
    kept,
    learned,
    network,
    our_steps,
    scheduler,
    their_steps,
)

from dalle2_jax.diffusion import gaussian, guidance, schedules, solvers  # noqa: E402

pytestmark = pytest.mark.parity


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
    ("variance_type", "kind", "net", "bound", "steps"),
    [
        ("fixed_small_log", "x_0", network, 5.0, 25),
        ("learned_range", "eps", learned, 1.0, 25),
        ("fixed_small_log", "eps", network, 1.0, 7),
    ],
    ids=["prior", "decoder", "super_res"],
)
def test_karlos_three_stages(
    variance_type: str,
    kind: str,
    net: Network,
    bound: float,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tables of float64, which `scheduler` gives theirs as well: as they are, in float32, their
    last step is off by 4e-5 to 5e-4."""
    made = scheduler(
        "UnCLIPScheduler",
        "squaredcos_cap_v2",
        variance_type=variance_type,
        prediction_type=KINDS[kind],
        clip_sample_range=bound,
    )
    made.set_timesteps(steps)
    s, (x_T, noise) = schedules.respace(OURS["squaredcos_cap_v2"], steps), drawn(steps)
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
