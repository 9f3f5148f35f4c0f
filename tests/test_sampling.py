"""The samplers' loop with networks known in closed form: rows, noise, guidance, progress."""

import dataclasses
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import TextEncoding
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.sampling.ar_prior import Settings as ARSettings
from dalle2_jax.sampling.decoder import DecoderSampler
from dalle2_jax.sampling.overrides import SamplingOptions
from dalle2_jax.sampling.prior import PriorSampler
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.sampling.stage import StageSampler, finish
from dalle2_jax.sampling.upsampler import UpsamplerSampler
from dalle2_jax.validation.sections import construct

PROCESS = Process("cosine", 20, "x_0")
KEY_DATA = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 3)))


def keys(rows=slice(None)):
    """Typed keys [b], new ones every time: no key is used twice."""
    return jax.random.wrap_key_data(jnp.asarray(KEY_DATA[rows]))


class Nothing(nn.Module):
    """A network in name only."""

    learned_null: bool = True


@dataclasses.dataclass(frozen=True)
class Sampler(StageSampler):
    """The network pulls x_t half way to a target that it is told; the null target is -1."""

    def apply(self, params, x_t, t, cond):
        return 0.5 * x_t * params["pull"] + 0.5 * cond

    def null(self, cond):
        return jnp.full_like(cond, -1.0)


PARAMS = {"pull": jnp.float32(1.0)}
COND = jnp.asarray([[0.1, 0.2], [0.3, 0.4], [-0.5, 0.6]])


def sampler(**settings) -> Sampler:
    settings = {"steps": 4, "solver": "ddpm", "clip": None} | settings
    return Sampler(Nothing(), PROCESS, Settings(**settings))


def draw(made, cond=COND, rows=slice(None), **options):
    progress = options.pop("progress", None)
    steps = made.sample(PARAMS, cond, keys(rows), cond.shape[1:], **options)
    return finish(steps, progress)


@pytest.mark.parametrize("solver", ["ddpm", "unipc", "heun"])
def test_a_row_depends_on_its_own_key_and_condition_alone(solver):
    made = sampler(solver=solver)
    whole = draw(made)
    alone = jnp.concatenate([draw(made, COND[i : i + 1], slice(i, i + 1)) for i in range(3)])
    np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-6)
    turned = draw(made, COND[::-1], slice(None, None, -1))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5, atol=1e-6)
    assert jnp.abs(draw(made, COND[:1], slice(1, 2)) - whole[:1]).max() > 1e-3


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++sde", "unipc"])
def test_given_noise_takes_the_place_of_the_keys(solver):
    made = sampler(solver=solver)
    noise = jax.random.normal(jax.random.key(5), (5, 3, 2))
    first = draw(made, noise=noise)
    np.testing.assert_array_equal(draw(made, rows=slice(None, None, -1), noise=noise), first)
    assert jnp.abs(draw(made, noise=noise.at[0].multiply(-1)) - first).max() > 1e-4
    last = draw(made, noise=noise.at[1].multiply(-1))  # a step's noise
    assert bool(jnp.abs(last - first).max() > 1e-4) == (solver in ("ddpm", "dpm++sde"))
    with pytest.raises(UserError, match=r"noise must be \[5, 3, ...\], or .*, not \(4, 3, 2\)"):
        draw(made, noise=noise[1:])


def test_a_perfect_x_0_is_found_in_one_step_or_many():
    for steps, solver in ((1, "ddim"), (20, "ddim"), (7, "unipc"), (4, "heun"), (5, "ddpm")):
        made = sampler(steps=steps, solver=solver)
        out = finish(made.sample({"pull": jnp.float32(0.0)}, COND, keys(), (2,)))
        np.testing.assert_allclose(out, 0.5 * COND, rtol=1e-4, atol=1e-5)


def test_guidance_goes_from_the_null_through_the_condition():
    """With an x_0 that ignores x_t: uncond + w (cond - uncond), here -0.5 + w (c/2 + 0.5)."""
    for w in (0.0, 1.0, 3.0):
        made = sampler(cfg_scale=w, solver="ddim")
        out = finish(made.sample({"pull": jnp.float32(0.0)}, COND, keys(), (2,)))
        np.testing.assert_allclose(out, -0.5 + w * (0.5 * COND + 0.5), rtol=1e-4, atol=1e-5)


def test_the_interval_says_where_guidance_acts():
    """An x_0 that ignores x_t and is guided at one step only: the last says which it was."""
    params, c = {"pull": jnp.float32(0.0)}, 0.5 * COND
    schedule = Settings(steps=4, solver="ddim").schedule(PROCESS)
    level = np.exp(-0.5 * schedule.logsnr)  # of the steps, the cleanest first
    settings = {"solver": "ddim", "cfg_scale": 3.0}

    def drawn(**more):
        made = sampler(**settings, **more)
        return np.asarray(finish(made.sample(params, COND, keys(), (2,))))

    guided = -0.5 + 3 * (c + 0.5)
    np.testing.assert_allclose(drawn(cfg_interval=(level[0], 1e9)), c, rtol=1e-4, atol=1e-5)
    clean = drawn(cfg_interval=(0.0, float(level[0]) * 1.001))
    np.testing.assert_allclose(clean, guided, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(drawn(cfg_interval=(0.0, 1e9)), drawn())
    unguided = np.asarray(finish(sampler(solver="ddim").sample(params, COND, keys(), (2,))))
    np.testing.assert_allclose(drawn(cfg_interval=(1e8, 1e9)), unguided, rtol=1e-5, atol=1e-6)


def test_rescaling_pulls_guidance_back():
    params = {"pull": jnp.float32(0.0)}
    plain, most = (
        finish(
            sampler(solver="ddim", cfg_scale=9.0, cfg_rescale=phi).sample(
                params, COND, keys(), (2,)
            )
        )
        for phi in (0.0, 1.0)
    )
    np.testing.assert_allclose(most.std(axis=1), (0.5 * COND).std(axis=1), rtol=1e-4)
    assert (plain.std(axis=1) > 5 * most.std(axis=1)).all()
    # with nothing to guide there is nothing to rescale
    alone = [draw(sampler(cfg_rescale=phi)) for phi in (0.0, 1.0)]
    np.testing.assert_allclose(*alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "interval", [(1.0,), (2.0, 1.0), (-1.0, 1.0), (0, math.inf), "0", 3, ("a", 1)]
)
def test_an_interval_of_another_shape_is_refused(interval):
    with pytest.raises(UserError, match=r"cfg_interval must be null or \[low, high\] of sigma"):
        Settings(cfg_interval=interval)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, "0.7", None])
def test_a_rescale_out_of_range_is_refused(value):
    with pytest.raises(UserError, match="cfg_rescale must be a number from 0 to 1, not"):
        Settings(cfg_rescale=value)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "unipc"])
@pytest.mark.parametrize("value", ["smal", None, 1.0, ("small",)])
def test_an_unknown_variance_is_refused(value, solver):
    with pytest.raises(UserError, match="variance must be 'small', 'large' or 'analytic', not"):
        Settings(solver=solver, variance=value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"solver": "dpm++"}, "goes with ddim at eta=0, not dpm++ at eta=0"),
        ({"eta": 0.5}, "goes with ddim at eta=0, not ddim at eta=0.5"),
        ({"variance": "analytic"}, 'does not go with variance="analytic"'),
    ],
)
def test_repeats_of_another_solver_are_refused(given, told):
    why = "(RePaint's resampling, for a decoder that was not trained to inpaint)"
    with pytest.raises(UserError, match=re.escape(f"repeats=5 {why} {told}")):
        Settings(repeats=5, **given)
    assert Settings(repeats=5).repeats == 5


def test_a_choice_tells_a_stage_that_is_not_there_from_a_setting_it_lacks():
    there = {"ar_prior": dataclasses.make_dataclass("AR", [("settings", ARSettings)])(ARSettings())}
    there |= {"decoder": sampler()}
    for choice, told in (
        ({"decodr": 3}, "steps: no stage 'decodr'; did you mean 'decoder'"),
        ({"ar_prior": 3}, "steps is no setting of ar_prior, but of decoder"),
    ):
        with pytest.raises(UserError, match=told):
            SamplingOptions(steps=choice).apply(there)
    with pytest.raises(UserError, match=r"variance must be 'small', .* not 'smal'"):
        SamplingOptions(variance="smal").apply(there)
    assert SamplingOptions(steps=3).apply(there)["decoder"].settings.steps == 3


@pytest.mark.parametrize("parts", [False, True])
def test_an_inversion_repeats_nothing(parts):
    class Half(UpsamplerSampler):
        def apply(self, params, x_t, t, cond):
            return 0.5 * x_t + params["pull"] * cond["low_res"]

    x_0 = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    params = {"first": {"pull": jnp.float32(0.1)}, "last": {"pull": jnp.float32(0.3)}}
    params = params if parts else params["first"]
    found, seen = [], []
    for repeats in (1, 3):
        settings = Settings(steps=4, clip=None, repeats=repeats)
        made = Half(Nothing(), PROCESS, settings, image_size=4, separate_last_step=parts)
        told = []
        found.append(
            finish(made.invert(params, {"low_res": x_0}, x_0), lambda *x, to=told: to.append(x))
        )
        seen.append(told)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
    assert seen[0] == seen[1] and seen[0][-1] == (4, 4)


def test_settings_come_from_json():
    said = {"steps": [10, 10, 3, 2, 2], "cfg_interval": [0.2, 5], "cfg_rescale": 0.7}
    made = construct(Settings, json.loads(json.dumps(said)), "here")
    same = Settings(steps=(10, 10, 3, 2, 2), cfg_interval=(0.2, 5), cfg_rescale=0.7)
    assert made == same and hash(made) == hash(same)
    assert json.loads(json.dumps(dataclasses.asdict(made)))["cfg_interval"] == [0.2, 5]


@pytest.mark.parametrize(
    ("solver", "count"), [("ddim", 4), ("unipc", 4), ("dpm++sde", 4), ("heun", 7)]
)
def test_evaluations_are_those_that_run(solver, count):
    ran = []

    class Counted(Sampler):
        def apply(self, params, x_t, t, cond):
            jax.debug.callback(lambda: ran.append(1))
            return super().apply(params, x_t, t, cond)

    made = Counted(Nothing(), PROCESS, Settings(steps=4, solver=solver, clip=None))
    jax.block_until_ready(draw(made))
    jax.effects_barrier()
    assert made.evaluations == count == len(ran)


def test_clip_bounds_x_0():
    made = sampler(cfg_scale=9.0, solver="ddim", clip=("static", 1.0))
    x_0 = finish(made.sample({"pull": jnp.float32(0.0)}, COND, keys(), (2,)))
    assert jnp.abs(x_0).max() <= 1.0


@pytest.mark.parametrize(("steps", "calls"), [(1, 1), (7, 2), (10, 2), (12, 3), (20, 4)])
def test_progress_rises_to_all_steps_and_changes_nothing(steps, calls):
    made, seen = sampler(steps=steps, solver="ddim"), []
    out = draw(made, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 1 + calls and seen[0] == (0, steps) and seen[-1] == (steps, steps)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    np.testing.assert_array_equal(draw(made), out)


@pytest.mark.parametrize(
    "clip",
    [
        ("static",),
        ("static", "x"),
        ("static", None),
        (),
        5,
        "static",
        ("static", math.nan),
        ("static", True),
        ("static", -1.0),
    ],
)
def test_a_clip_of_another_shape_is_refused(clip):
    with pytest.raises(UserError, match="clip must be null, "):
        Settings(clip=clip)


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps_are_refused(steps):
    with pytest.raises(UserError, match=f"steps must be whole numbers from 1, not {steps}"):
        Settings(steps=steps)


def test_too_many_steps_and_unknown_solvers_are_refused():
    with pytest.raises(UserError, match="steps must be at most 20, not 21"):
        draw(sampler(steps=21))
    with pytest.raises(UserError, match="unknown sampler 'ddin'; did you mean 'ddim'"):
        draw(sampler(solver="ddin"))
    with pytest.raises(UserError, match="spacing='even' takes one number of steps, not"):
        Settings(steps=(2, 3), spacing="even")
    assert Settings(steps=(2, 3), spacing="sections").num_steps == 5


def test_the_prior_keeps_the_candidate_nearer_to_the_text():
    class Prior(PriorSampler):
        def apply(self, params, x_t, t, cond):
            return x_t  # each candidate stays its own noise

    z_txt = jnp.eye(4)[:3]
    text = TextEncoding(z_txt, jnp.zeros((3, 2, 4)), jnp.ones((3, 2), bool))
    settings = Settings(steps=2, clip=None)
    network = DiffusionPrior(dim=4, context_length=2, width=4, depth=1, heads=1)
    near = []
    for k in (1, 2, 16):
        made = Prior(network, PROCESS, settings, candidates=k)
        z = finish(made({}, text._asdict(), keys()))
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1.0, rtol=1e-5)
        near.append(jnp.sum(z * z_txt, axis=-1))
        # of the candidates, drawn one by one, it is the nearest
        split = jax.vmap(lambda key, k=k: jax.random.split(key, k))(keys())
        each = made.sample(
            {},
            {"x": jnp.zeros((3 * k, 1)), "txt_mask": jnp.ones((3 * k, 2), bool)},
            split.reshape(-1),
            (4,),
        )
        each = finish(each).reshape(3, k, 4)
        each = each / jnp.linalg.norm(each, axis=-1, keepdims=True)
        best = jnp.einsum("bkd,bd->bk", each, z_txt).max(axis=1)
        np.testing.assert_allclose(near[-1], best, rtol=1e-5, atol=1e-6)
    assert (near[2] > near[0] - 1e-6).sum() >= 2


def test_null_conditions_hide_the_condition_and_nothing_else():
    cond = {
        "z_img": jnp.ones((2, 4)),
        "z_mask": jnp.ones((2,), bool),
        "txt_mask": jnp.ones((2, 3), bool),
        "tokens": jnp.ones((2, 3), jnp.int32),
    }
    null = DecoderSampler(Nothing(), PROCESS, Settings(steps=4)).null(cond)
    assert not null["z_mask"].any() and not null["txt_mask"].any()
    assert null["z_img"] is cond["z_img"] and null["tokens"] is cond["tokens"]
    text = {"z_txt": jnp.ones((2, 4)), "txt_mask": jnp.ones((2, 3), bool)}
    assert not PriorSampler(Nothing(), PROCESS, Settings(steps=4)).null(text)["txt_mask"].any()


def test_the_upsampler_is_told_the_small_image_at_the_large_size():
    class Copy(UpsamplerSampler):
        def apply(self, params, x_t, t, cond):
            return cond["low_res"]

    low = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    made = Copy(Nothing(), PROCESS, Settings(steps=2), image_size=8)
    out = finish(made({}, low, keys(slice(2))))
    assert out.shape == (2, 8, 8, 3) and jnp.abs(out).max() <= 1
    middle = out.reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(middle[:, 1:3, 1:3], low[:, 1:3, 1:3], atol=0.05)


def test_equal_samplers_are_one_static_argument():
    assert sampler() == sampler() and hash(sampler()) == hash(sampler())
    assert sampler() != sampler(steps=5)


def test_another_number_does_not_compile_anew():
    """The guidance scale, eta, steps, the interval: arguments of one program a solver."""
    from dalle2_jax.sampling import stage

    params = {"pull": jnp.float32(0.5)}

    def run(**settings):
        made = sampler(**({"solver": "ddim", "cfg_scale": 2.0} | settings))
        return np.asarray(finish(made.sample(params, COND, keys(), (2,))))

    first, compiled = run(), stage._advance._cache_size()
    others = [
        run(cfg_scale=3.5),
        run(cfg_rescale=0.5),
        run(eta=0.7),
        run(steps=7),
        run(steps=20),
        run(steps=(2, 3)),
        run(spacing="trailing", steps=5),
    ]
    assert stage._advance._cache_size() == compiled
    assert all(np.abs(other - first).max() > 1e-6 for other in others)
    run(cfg_interval=(0.1, 5.0))
    compiled = stage._advance._cache_size()
    run(cfg_interval=(0.5, 2.0))
    assert stage._advance._cache_size() == compiled
    run(solver="dpm++")  # another program
    assert stage._advance._cache_size() == compiled + 1


def test_the_prediction_of_x_0_comes_with_the_progress():
    made = sampler(solver="ddim", steps=10)
    events = list(made.sample(PARAMS, COND, keys(), (2,)))
    assert [(event.done, event.total) for event in events] == [(0, 10), (5, 10), (10, 10)]
    assert events[0].x_0 is None
    # At the last step x_0 is what comes out: there is no noise left.
    np.testing.assert_allclose(events[-1].x_0, finish(made.sample(PARAMS, COND, keys(), (2,))))
    assert np.abs(events[1].x_0 - events[-1].x_0).max() > 1e-3
    often = dataclasses.replace(made, steps_a_call=2)
    assert often == made  # the same program
    dones = [event.done for event in often.sample(PARAMS, COND, keys(), (2,))]
    assert dones == [0, 2, 4, 6, 8, 10]
