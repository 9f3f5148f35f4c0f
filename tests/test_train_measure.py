"""What a task measures of its network at the end of training: kept in the stage's entry."""

import pathlib

import jax
import numpy as np
import pytest
import small_cascade
from toy_task import losses

from dalle2_jax import build
from dalle2_jax.diffusion import analytic
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.storage import model_folder
from dalle2_jax.train import loop
from dalle2_jax.train.step import global_batch, make_measure, place_frozen

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")
ANALYTIC = dict(task__sampling__solver="ddpm", task__sampling__variance="analytic")


def train(model, workdir, steps, **changes):
    data = dict(small_cascade.DATA, source="emoji", path=FIXTURE, image_size=16)
    run = dict(num_steps=steps, checkpoint_every=2, log_every=1, eval_batches=2)
    run |= dict(export_to=str(model), data=data, preview_size=2, **changes)
    config = small_cascade.config("prior", str(model), **run)
    return loop.train(config, build.task(config), build.dataset(config, "train"), workdir)


@pytest.mark.usefixtures("one_device")
def test_a_prior_is_exported_with_what_analytic_variances_need(tmp_path):
    model = tmp_path / "model"
    small_cascade.write(model, ["clip", "decoder"])
    train(model, tmp_path / "w", 4, preview_every=2, export_every=1, **ANALYTIC)
    once = model_folder.read_stage(model, "prior")
    assert len(once["x_0_error"]) == analytic.KNOTS and min(once["x_0_error"]) > 0
    # To measure at every step changes nothing of the run, nor does a stop in between.
    train(model, tmp_path / "p", 2, **ANALYTIC)
    train(model, tmp_path / "p", 4, **ANALYTIC)
    assert losses(tmp_path / "p") == losses(tmp_path / "w")
    assert model_folder.read_stage(model, "prior") == once

    drawing = DALLE2.from_pretrained(str(model))
    assert drawing.settings()["prior"]["variance"] == "analytic"
    z = {
        name: drawing.with_settings(**choice).sample_prior("a red apple", n=4)
        for name, choice in {
            "analytic": {},
            "small": {"variance": {"prior": "small"}},
            "ddim": {"solver": {"prior": "ddim"}, "variance": {"prior": "small"}},
            "analytic ddim": {"solver": {"prior": "ddim"}},
            "dpm++": {"solver": {"prior": "dpm++"}},
        }.items()
    }
    assert np.abs(z["analytic"] - z["small"]).max() > 1e-3
    assert np.abs(z["analytic ddim"] - z["ddim"]).max() > 1e-3
    with pytest.raises(UserError, match='variance="analytic" needs x_0_error'):
        drawing.with_settings(solver={"decoder": "ddpm"}, variance="analytic")
    with pytest.raises(UserError, match=r"variance must be 'small', .* not 'smal'"):
        drawing.with_settings(variance="smal")


@pytest.mark.usefixtures("one_device")
def test_weights_without_it_are_measured_by_a_run_of_no_steps(tmp_path):
    model = tmp_path / "model"
    small_cascade.write(model)
    with pytest.raises(UserError, match=r'variance="analytic" needs x_0_error.* docs/sampling.md'):
        DALLE2.from_pretrained(str(model)).with_settings(
            solver={"prior": "ddpm"}, variance={"prior": "analytic"}
        )
    before = model_folder.read_params(model, "prior")
    with pytest.raises(UserError, match="num_steps=0 exports the weights of"):
        train(model, tmp_path / "w", 0)
    train(model, tmp_path / "w", 0, init_from=str(model), **ANALYTIC)
    jax.tree.map(np.testing.assert_array_equal, before, model_folder.read_params(model, "prior"))
    assert DALLE2.from_pretrained(str(model)).sample_prior("a red apple").shape == (1, 16)
    entry = model_folder.read_stage(model, "prior")
    for damaged in ("many", [1, "2"], [-1.0], [True], [1e9] * 3):
        model_folder.write_stage(model, "prior", {**entry, "x_0_error": damaged}, before)
        with pytest.raises(UserError, match=r"prior: .*x_0_error"):
            DALLE2.from_pretrained(str(model))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_eight_devices_measure_as_one(tmp_path, sizes):
    config = small_cascade.config("prior", small_cascade.write(tmp_path, ["clip"]), batch_size=8)
    task, found = build.task(config), []
    params = small_cascade.random_params(task.init)
    rules = ((".*", "fsdp:1"),)
    for devices, shape in ((1, {}), (8, sizes)):
        mesh = sharding.make_mesh(shape, jax.devices()[:devices])
        placed = jax.device_put(params, sharding.param_shardings(params, rules, mesh))
        frozen = place_frozen(task.frozen(), mesh)
        batch = global_batch(small_cascade.batch(8), mesh)
        measure = make_measure(task, rules, mesh)
        found.append(measure(placed, frozen, batch, jax.random.key(1))["x_0_error"])
    np.testing.assert_allclose(np.asarray(found[0]), np.asarray(found[1]), rtol=1e-4)
