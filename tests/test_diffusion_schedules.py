"""One property test for every schedule, and respacing against the schedule it came from."""

import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import schedules
from dalle2_jax.errors import UserError

EVERY = [(name, n) for name in ("cosine", "linear") for n in (1, 2, 10, 100, 250, 1000, 4000)]
TABLES = [
    "alpha",
    "beta",
    "alpha_bar_prev",
    "sqrt_alpha_bar",
    "sqrt_one_minus_alpha_bar",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef_x_0",
    "posterior_mean_coef_x_t",
    "logsnr",
]


def up_to_all(*counts: int) -> list[tuple[str, int, int]]:
    """Returns (name, n, steps) for every schedule and each of `counts` that it has steps for."""
    return [(name, n, steps) for name, n in EVERY for steps in counts if steps <= n]


@pytest.mark.parametrize(("name", "n"), EVERY)
def test_properties_of_every_schedule(name: str, n: int) -> None:
    s = schedules.make(name, n)
    assert s.num_timesteps == n
    assert s.alpha_bar.dtype == np.float64
    assert (np.diff(s.alpha_bar) < 0).all()
    assert (s.alpha_bar > 0).all() and (s.alpha_bar < 1).all()
    assert (s.beta > 0).all() and (s.beta <= schedules.MAX_BETA + 1e-12).all()
    np.testing.assert_array_equal(s.timesteps, np.arange(n))
    np.testing.assert_allclose(np.cumprod(1 - s.beta), s.alpha_bar, rtol=1e-9)
    np.testing.assert_allclose(s.sqrt_alpha_bar**2 + s.sqrt_one_minus_alpha_bar**2, 1)
    assert (np.diff(s.logsnr) < 0).all()
    assert s.posterior_variance[0] == 0
    assert (s.posterior_variance <= s.beta).all()
    # The posterior mean of a noiseless x_t = sqrt(abar) x_0 is the noiseless x_{t-1}.
    mean = s.posterior_mean_coef_x_0 + s.posterior_mean_coef_x_t * s.sqrt_alpha_bar
    np.testing.assert_allclose(mean, np.sqrt(s.alpha_bar_prev), rtol=1e-9)
    for table in TABLES:
        values = getattr(s, table)
        assert values.shape == (n,) and values.dtype == np.float64 and np.isfinite(values).all()
    if n >= 100:
        assert s.alpha_bar[0] > 0.99 and s.alpha_bar[-1] < 1e-4


def test_cosine_is_iddpms_closed_form_where_no_beta_is_clipped() -> None:
    s = schedules.cosine(1000)
    t = np.arange(1, 990) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(s.alpha_bar[:989], f, rtol=1e-9)


def test_linear_has_ddpms_ends_and_keeps_its_shape_at_other_lengths() -> None:
    np.testing.assert_allclose(schedules.linear(1000).beta[[0, -1]], [1e-4, 0.02], rtol=1e-9)
    np.testing.assert_allclose(schedules.linear(4000).beta[[0, -1]], [2.5e-5, 0.005], rtol=1e-9)


@pytest.mark.parametrize(("name", "n", "steps"), up_to_all(1, 2, 7, 64, 250))
def test_respaced_tables_agree_with_the_originals(name: str, n: int, steps: int) -> None:
    s = schedules.make(name, n)
    r = schedules.respace(s, steps)
    assert r.num_timesteps == steps
    np.testing.assert_array_equal(r.alpha_bar, s.alpha_bar[r.timesteps])
    np.testing.assert_array_equal(r.logsnr, s.logsnr[r.timesteps])
    np.testing.assert_allclose(np.cumprod(1 - r.beta), r.alpha_bar, rtol=1e-6, atol=1e-15)
    assert (r.beta > 0).all() and (r.beta <= 1).all()
    assert r.timesteps[-1] == n - 1 and (steps == 1 or r.timesteps[0] == 0)
    gaps = np.diff(r.timesteps)
    assert steps == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_respacing_to_every_step_is_the_identity(name: str) -> None:
    s = schedules.make(name, 100)
    for r in (schedules.respace(s, 100), schedules.respace(s, range(100))):
        np.testing.assert_array_equal(r.timesteps, s.timesteps)
        for table in ["alpha_bar", *TABLES]:
            np.testing.assert_array_equal(getattr(r, table), getattr(s, table))


def test_respacing_twice_still_names_the_original_steps() -> None:
    s = schedules.cosine(1000)
    twice = schedules.respace(schedules.respace(s, [0, 100, 500, 900, 999]), [1, 3])
    np.testing.assert_array_equal(twice.timesteps, [100, 900])
    np.testing.assert_array_equal(twice.alpha_bar, s.alpha_bar[[100, 900]])


def test_glides_27_steps() -> None:
    """What `space_timesteps(1000, ...)` of glide-text2im/respace.py gives for "10,10,3,2,2", and
    for "fast27", which moves the noisiest from 999 to 997."""
    told = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355]
    told += [377, 399, 400, 500, 599, 600, 799, 800, 999]
    linear = schedules.linear(1000)
    r = schedules.respace(linear, [10, 10, 3, 2, 2], spacing="sections")
    np.testing.assert_array_equal(r.timesteps, told)
    r = schedules.respace(linear, 27, spacing="fast27")
    np.testing.assert_array_equal(r.timesteps, [*told[:-1], 997])
    with pytest.raises(UserError, match="'fast27' has 27 steps, not 26"):
        schedules.respace(linear, 26, spacing="fast27")


@pytest.mark.parametrize(("name", "n", "steps"), up_to_all(1, 2, 20, 50))
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
def test_other_spacings_keep_distinct_steps_up_to_the_last(
    name: str, n: int, steps: int, spacing: str
) -> None:
    r = schedules.respace(schedules.make(name, n), steps, spacing)
    assert r.num_timesteps == steps and r.timesteps[-1] == n - 1
    assert (np.diff(r.timesteps) > 0).all() and r.timesteps[0] >= 0
    whole = schedules.respace(schedules.make(name, n), n, spacing)
    np.testing.assert_array_equal(whole.timesteps, np.arange(n))


def test_trailing_steps_end_as_long_as_they_began() -> None:
    r = schedules.respace(schedules.cosine(1000), 10, "trailing")
    np.testing.assert_array_equal(r.timesteps, np.arange(99, 1000, 100))


def test_steps_even_in_logsnr() -> None:
    r = schedules.respace(schedules.linear(1000), 20, "logsnr")
    gaps = -np.diff(r.logsnr)
    assert gaps.max() < 1.7 * gaps.min()


def test_sections_of_uneven_length_cover_all() -> None:
    r = schedules.respace(schedules.linear(11), [4, 4, 3], spacing="sections")
    np.testing.assert_array_equal(r.timesteps, np.arange(11))


@pytest.mark.parametrize("steps", [0, 11, [], [3, 3], [-1, 4], [4, 10]])
def test_respacing_refuses_what_cannot_be_kept(steps: object) -> None:
    with pytest.raises(UserError, match="keep"):
        schedules.respace(schedules.cosine(10), steps)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        schedules.make("cosin", 10)
    with pytest.raises(UserError, match="num_timesteps"):
        schedules.make("cosine", 0)
    with pytest.raises(UserError, match="spacing must be"):
        schedules.respace(schedules.cosine(10), 5, spacing="evne")
    with pytest.raises(UserError, match="a count for each section"):
        schedules.respace(schedules.cosine(10), 5, spacing="sections")


def test_extract_broadcasts_and_casts() -> None:
    table = np.linspace(0, 1, 5)
    picked = schedules.extract(table, jnp.array([4, 0]), 4)
    assert picked.shape == (2, 1, 1, 1) and picked.dtype == jnp.float32
    np.testing.assert_array_equal(picked.ravel(), [1, 0])
    assert schedules.extract(table, 2, 3).shape == (1, 1, 1)


@pytest.mark.parametrize("num_timesteps", [0, 100_001, 10**9, 20.5, True])
def test_a_number_of_timesteps_that_nobody_wants_is_refused(num_timesteps):
    with pytest.raises(UserError, match=f"from 1 to 100000, not {num_timesteps}"):
        schedules.make("cosine", num_timesteps)
