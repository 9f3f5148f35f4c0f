"""The autoregressive prior's task: its loss, and the statistics that are fitted and stay."""

import dataclasses
import itertools
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_cascade
from small_cascade import CONTEXT, DIM, batch, random_params, randomised
from toy_task import losses

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import model_folder
from dalle2_jax.tasks.ar_prior import directions
from dalle2_jax.train import loop
from dalle2_jax.train.optimizer import decay_mask
from dalle2_jax.train.step import gathering_layers, global_batch, make_preview, place_frozen

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")
AR = small_cascade.AR_PRIOR


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return small_cascade.write(tmp_path_factory.mktemp("clip"), ["clip"])


def make(clip_folder, **changes):
    return build.task(small_cascade.config("ar_prior", clip_folder, **changes))


def images(count, size=8):
    rng = np.random.default_rng(0)
    for _ in range(count):
        made = batch(size)
        yield {
            "image": rng.integers(0, 256, made["image"].shape, np.uint8),
            "tokens": made["tokens"],
        }


def embeddings(task, batches):
    pairs = []
    for given in batches:
        given = jax.tree.map(jnp.asarray, given)
        z = task.clip.encode_image(task.frozen()["clip"], arrays.to_float(given["image"]))
        pairs.append((z, task.clip.encode_text(task.frozen()["clip"], given["tokens"]).z_txt))
    return tuple(np.concatenate(x).astype(np.float64) for x in zip(*pairs, strict=True))


@pytest.mark.parametrize("devices", [1, 8])
def test_the_statistics_are_the_svds(clip_folder, devices):
    """On any mesh: numpy's singular vectors in float64, and the ranges along them."""
    task = make(clip_folder, task__fit_batches=5)
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    rules = ((".*", "fsdp:1"),)
    params = jax.jit(task.init)(jax.random.key(0))
    params = jax.device_put(params, sharding.param_shardings(params, rules, mesh))
    frozen = place_frozen(task.frozen(), mesh)

    def endless():
        return (global_batch(x, mesh) for x in itertools.cycle(images(5)))

    with gathering_layers(mesh, rules, params, frozen):
        found = jax.tree.map(np.asarray, task.fit(params, frozen, endless))

    z, z_txt = embeddings(task, images(5))
    k = task.network.dims
    mean = z.mean(axis=0)
    _, scale, vectors = np.linalg.svd(z - mean, full_matrices=False)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    cosines = np.sum(found["components"] * vectors[:k], axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)
    np.testing.assert_allclose(found["components"] @ found["components"].T, np.eye(k), atol=1e-4)
    assert (
        np.take_along_axis(found["components"], np.abs(found["components"]).argmax(1)[:, None], 1)
        > 0
    ).all()
    values = (z - mean) @ found["components"].T
    np.testing.assert_allclose(values.std(axis=0), scale[:k] / len(z) ** 0.5, rtol=1e-2)
    values = np.concatenate([np.sum(z * z_txt, axis=1, keepdims=True), values], axis=1)
    np.testing.assert_allclose(found["low"], values.min(axis=0), atol=1e-4)
    np.testing.assert_allclose(found["high"], values.max(axis=0), atol=1e-4)


def test_the_directions_that_are_kept_hold_their_share():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1000, 6)) @ np.diag([5, 4, 3, 2, 1, 0.1]) + 3
    moments = jnp.asarray(z.mean(axis=0)), jnp.asarray(z.T @ z / len(z))
    variances = np.linalg.svd(z - z.mean(axis=0), compute_uv=False) ** 2
    for k in (1, 4, 6):
        _, found, kept = directions(*moments, k)
        assert found.shape == (k, 6)
        assert float(kept) == pytest.approx(variances[:k].sum() / variances.sum(), rel=1e-4)


def run(clip_folder, workdir, steps, **changes):
    model = workdir / "model"
    if not model.exists():
        shutil.copytree(clip_folder, model)
    data = dict(small_cascade.DATA, source="emoji", path=FIXTURE, image_size=16)
    settings = dict(num_steps=steps, checkpoint_every=2, log_every=1, eval_batches=1)
    settings |= dict(preview_size=2, data=data, export_to=str(model), task__fit_batches=3)
    settings |= dict(optimizer=dict(weight_decay=0.5, learning_rate=1e-2, eps=1e-10))
    config = small_cascade.config("ar_prior", str(model), **(settings | changes))
    datasets = [build.dataset(config, split) for split in ("train", "held_out_pairs")]
    state = loop.train(config, build.task(config), datasets[0], workdir, datasets[1]).state
    return jax.tree.map(np.asarray, state)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.usefixtures("one_device")
def test_the_statistics_are_fitted_once_and_stay(clip_folder, tmp_path, monkeypatch):
    """Neither the optimiser nor its weight decay nor the averaging moves them; what goes on from a
    checkpoint, or from a model folder, fits none again and comes to the same bytes."""
    whole = run(clip_folder, tmp_path / "whole", 4, eval_every=2, preview_every=4)
    first = run(clip_folder, tmp_path / "parts", 2)
    given = first.params["statistics"]
    assert not np.allclose(given["low"], -1) and not np.allclose(
        given["components"], np.eye(*given["components"].shape)
    )
    for state in (whole, first):
        for tree in (state.params, state.ema_params):
            assert same(tree["statistics"], given)
    assert not same(first.params["transformer"], whole.params["transformer"])
    exported = model_folder.read_params(tmp_path / "whole" / "model", "ar_prior")
    assert same(exported["statistics"], given)

    def never(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr("dalle2_jax.tasks.ar_prior.ARPriorTask.fit", never)
    again = run(clip_folder, tmp_path / "parts", 4)
    assert same(again.params, whole.params) and losses(tmp_path / "whole") == losses(
        tmp_path / "parts"
    )
    begun = run(clip_folder, tmp_path / "from", 2, init_from=str(tmp_path / "whole" / "model"))
    assert same(begun.params["statistics"], given)
    shown = list((tmp_path / "whole" / "previews").iterdir())
    assert len(shown) == 1 and "ar_prior" in shown[0].name


@pytest.mark.usefixtures("one_device")
def test_weights_of_another_clip_are_no_start(clip_folder, tmp_path):
    """What was fitted to its embeddings stays, and says nothing of this one's."""
    small_cascade.write(tmp_path / "start", ["clip", "ar_prior"])
    other = shutil.copytree(clip_folder, tmp_path / "other")
    entry, tensors = (f(other, "clip") for f in (model_folder.read_stage, model_folder.read_params))
    model_folder.write_stage(other, "clip", entry, randomised(tensors, 7))
    with pytest.raises(UserError, match="start: its ar_prior was fitted to another CLIP") as error:
        run(other, tmp_path / "w", 1, init_from=str(tmp_path / "start"))
    assert "\n" not in str(error.value)


def test_what_is_fitted_is_not_decayed(clip_folder):
    task = make(clip_folder)
    mask = decay_mask(jax.eval_shape(task.init, jax.random.key(0)), task.trainable)
    assert not any(jax.tree.leaves(mask["statistics"]))
    assert mask["positions"] and mask["out"]["kernel"] and not mask["bias"]


@pytest.fixture(scope="module")
def task(clip_folder):
    made = make(clip_folder)
    return made, random_params(made.init)


def loss_of(task, params, given=None, train=True, key=0):
    value, metrics = jax.jit(task.loss, static_argnums=4)(
        params, task.frozen(), given or batch(), jax.random.key(key), train
    )
    return float(value), {name: float(x) for name, x in metrics.items()}


def test_the_loss_is_the_cross_entropy_of_the_codes(task):
    made, params = task
    value, metrics = loss_of(made, params, train=False)
    given, frozen = batch(), made.frozen()
    z = made.clip.encode_image(frozen["clip"], arrays.to_float(given["image"]))
    text = made.clip.encode_text(frozen["clip"], given["tokens"])
    logits, codes = made.network.apply({"params": params}, z, *text)
    p = np.asarray(jax.nn.softmax(logits))
    nats = -np.log(np.take_along_axis(p, np.asarray(codes)[..., None], 2))[..., 0]
    assert value == pytest.approx(nats.mean(), rel=1e-4)
    assert metrics["dot"] == pytest.approx(nats[:, 0].mean(), rel=1e-4)
    assert metrics["codes"] == pytest.approx(nats[:, 1:].mean(), rel=1e-4)
    assert 0 <= metrics["accuracy"] <= 1 and -1 <= metrics["round_trip"] <= 1


def test_a_network_that_knows_nothing_is_at_the_uniform_loss(task):
    made, params = task
    params = {**params, "bias": 0 * params["bias"], "out": {"kernel": 0 * params["out"]["kernel"]}}
    value, _ = loss_of(made, params)
    assert value == pytest.approx(math.log(made.network.buckets), rel=1e-5)


def test_captions_are_dropped_in_training_alone(task):
    made, params = task
    always, never = (dataclasses.replace(made, drop_caption=p) for p in (1.0, 0.0))
    assert loss_of(always, params)[0] != loss_of(never, params)[0]
    assert loss_of(always, params, train=False) == loss_of(never, params, train=False)


def test_noise_moves_codes_in_training_alone(task):
    made, params = task
    moved = dataclasses.replace(made, noise=0.5)
    assert loss_of(moved, params)[0] != loss_of(made, params)[0]
    assert loss_of(moved, params, train=False) == loss_of(made, params, train=False)


def test_the_preview_shows_a_row_an_example(task):
    made, params = task
    shown = made.preview(params, made.frozen(), batch(), jax.random.key(0), 2)["ar_prior"]
    assert shown.shape == (2, 5, 16, 16, 3) and shown.dtype == jnp.uint8


def test_the_preview_is_the_same_on_any_mesh(task):
    made, params = task
    rules, shown = ((".*", "fsdp:1"),), []
    for devices in (1, 8):
        mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
        run = make_preview(made, rules, mesh, 8)
        placed = jax.device_put(params, sharding.param_shardings(params, rules, mesh))
        given = global_batch(jax.tree.map(np.asarray, batch(8)), mesh)
        frozen = place_frozen(made.frozen(), mesh)
        shown.append(np.asarray(run(placed, frozen, given, jax.random.key(0))[0]["ar_prior"]))
    np.testing.assert_array_equal(*shown)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"task__drop_caption": 1.5},
            "config.task.drop_caption must be a number from 0 to 1, not 1.5",
        ),
        ({"task__fit_batches": 1}, "config.task.fit_batches=1 are 4 images, which have no 6"),
        ({"task__fit_batches": 0}, "config.task.fit_batches must be a whole number from 1, not 0"),
        ({"task__fit_batches": "x"}, "config.task.fit_batches must be a whole .*, not 'x'"),
        ({"task__fit_batches": 2.5}, "config.task.fit_batches must be a whole .*, not 2.5"),
        ({"task__candidates": 0}, "config.task.candidates must be a whole number from 1, not 0"),
        ({"task__candidates": 1.5}, "config.task.candidates must be a whole .*, not 1.5"),
        ({"model__dims": DIM + 1}, f"config.model.dims must be .* from 1 to {DIM}, not {DIM + 1}"),
        ({"model__dims": 2.5}, "config.model.dims must be a whole .*, not 2.5"),
        ({"model__dims": "6"}, "config.model.dims must be a whole .*, not '6'"),
        ({"model__buckets": 1}, "config.model.buckets must be a whole number from 2, not 1"),
        ({"model__buckets": 16.0}, "config.model.buckets must be a whole .*, not 16.0"),
        ({"model__heads": 3}, "config.model.heads=3 must divide config.model.width=16"),
        ({"model__context_length": CONTEXT + 1}, "set --config.model.context_length=8"),
        (
            {"task__sampling__dot_share": 0},
            "config.task.sampling: dot_share must be a number from 1e-06 to 1, not 0",
        ),
        ({"task__sampling__temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_what_cannot_be_trained_is_refused(clip_folder, change, told):
    with pytest.raises(UserError, match=told) as error:
        make(clip_folder, **change)
    assert "\n" not in str(error.value)
