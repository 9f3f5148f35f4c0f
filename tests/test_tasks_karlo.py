"""Tasks of networks such as Karlo's: no caption is the empty one, z_img is standardised by
statistics that stay, the last step is another network's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_cascade
from small_cascade import KARLO, batch, random_params

from dalle2_jax import build
from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.conditioning import decoder_condition, prior_condition
from dalle2_jax.storage import model_folder
from dalle2_jax.tasks.decoder import disturb
from dalle2_jax.tasks.shared.denoising import denoising_loss
from dalle2_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    task = build.task(small_cascade.config("clip", **KARLO["clip"]))
    params = random_params(task.init)
    model_folder.write_stage(folder, "clip", *task.export(params))
    return str(folder)


def config(stage, clip_folder, **changes):
    return small_cascade.config(stage, clip_folder, **(KARLO[stage] | changes))


def make(stage, clip_folder, **changes):
    task = build.task(config(stage, clip_folder, **changes))
    params = random_params(task.init)
    if stage == "prior":
        params = {**params, "std": 1 + jnp.abs(params["std"])}
    return task, params


def gradients(task, params, given=None, train=True):
    """(loss, metrics, gradients) of a batch, always with the same noise."""
    loss = jax.jit(jax.value_and_grad(lambda *x: task.loss(*x, train), has_aux=True))
    (value, metrics), grads = loss(params, task.frozen(), given or batch(), jax.random.key(0))
    return float(value), metrics, grads


def loss_of(task, params, given=None, train=True) -> float:
    """The loss alone, with the noise of `gradients`: it compiles in a fraction of the time."""
    loss = jax.jit(lambda *x: task.loss(*x, train)[0])
    return float(loss(params, task.frozen(), given or batch(), jax.random.key(0)))


def nothing_said(size=4):
    tokens = Tokenizer(small_cascade.CONTEXT, small_cascade.VOCAB)([""] * size)
    return {**batch(size), "tokens": jnp.asarray(tokens)}


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_dropped_caption_is_the_empty_one(stage, clip_folder):
    dropped, params = make(stage, clip_folder, task__drop_caption=1.0)
    kept = dataclasses.replace(dropped, drop_caption=0.0)
    want = loss_of(kept, params, nothing_said())
    assert loss_of(dropped, params) == pytest.approx(want, rel=1e-6)
    assert loss_of(dropped, params, train=False) == loss_of(kept, params, train=False)
    assert abs(loss_of(kept, params) - want) > 1e-4


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_trainer_and_sampler_agree_on_what_no_caption_is(stage, clip_folder):
    task, _ = make(stage, clip_folder)
    frozen, given = task.frozen(), batch()
    keep = jnp.array([True, False, True, False])
    text, empty = (
        task.clip.encode_text(frozen["clip"], x["tokens"]) for x in (given, nothing_said())
    )
    if stage == "prior":
        found = task.condition(frozen, given["tokens"], keep)
        told = prior_condition(task.network, text, empty)
    else:
        found = task.condition(frozen, given, keep)
        told = decoder_condition(task.network, found["z_img"], text, given["tokens"], None, empty)
        assert "z_txt" in found
    null = task.sampler.null(told)
    for name, value in found.items():
        if name != "z_mask":  # dropped by itself
            want = np.where(keep.reshape(-1, *[1] * (value.ndim - 1)), told[name], null[name])
            np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    assert not np.allclose(null["txt_enc"], told["txt_enc"])


def test_the_prior_learns_the_standardised_embedding(clip_folder):
    """With a network that says 0 the loss is the mean square of (z_img - mean) / std; the
    statistics themselves get no gradient."""
    task, params = make("prior", clip_folder)
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    loss, _, grads = gradients(task, params)
    z = task.clip.encode_image(task.frozen()["clip"], arrays.to_float(batch()["image"]))
    assert not np.allclose(np.linalg.norm(z, axis=1), 1)
    mean, std = (np.asarray(params[name]) for name in ("mean", "std"))
    assert loss == pytest.approx(np.square((np.asarray(z) - mean) / std).mean(), rel=1e-4)
    assert not grads["mean"].any() and not grads["std"].any() and grads["out"]["bias"].any()


def test_what_is_drawn_is_what_was_learned(clip_folder):
    task, params = make("prior", clip_folder)
    z = jax.random.normal(jax.random.key(0), (3, 16))
    x_0 = task.network.apply({"params": params}, z, method="to_x_0")
    back = task.network.apply({"params": params}, x_0, method="to_z_img")
    np.testing.assert_allclose(back, z, rtol=1e-5, atol=1e-5)
    entry = task.export(params)[0]
    assert entry["candidates"] == task.sampler.candidates == 1 and not task.sampler.unit_length


def test_a_disturbed_z_img_keeps_its_length():
    z = np.random.default_rng(0).normal(size=(5, 64)) * np.array([[0.1], [1], [3], [10], [50]])
    found = np.asarray(disturb(jax.random.key(0), jnp.asarray(z, jnp.float32), 1.0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(z, axis=1), rtol=1e-5)
    assert not np.allclose(found, z, rtol=0.01)


@pytest.mark.parametrize("learns", [("first",), ("last",), ("first", "last")])
def test_only_the_upsamplers_networks_that_are_named_learn(learns, clip_folder):
    task, params = make("upsampler", clip_folder, task__learns=learns)
    total, metrics, grads = gradients(task, params)
    for part in ("first", "last"):
        moved = any(x.any() for x in jax.tree.leaves(grads[part]))
        assert moved == (part in learns) == (f"{part}_mse" in metrics)
    assert total == pytest.approx(float(sum(metrics.values())), rel=1e-5)


def test_each_of_the_upsamplers_networks_learns_the_times_that_it_serves(clip_folder):
    task, params = make("upsampler", clip_folder)
    schedule = task.sampler.settings.schedule(task.process)
    steps = [int(t) for t in schedule.timesteps[::-1]]
    for part, (_, count) in zip(("first", "last"), task.sampler.parts(params), strict=True):
        served, steps = steps[:count], steps[count:]
        assert set(served) <= set(task.times[part])
    assert sorted([*task.times["first"], *task.times["last"]]) == list(range(30))

    seen = []

    def apply(x_t, t):
        seen.extend(t.tolist())
        return x_t

    for key in range(4):
        denoising_loss(Process(), apply, jnp.zeros((64, 2)), jax.random.key(key), range(7, 12))
    assert set(seen) == set(range(7, 12))


def test_an_upsampler_of_two_networks_is_built_again(clip_folder):
    task, params = make("upsampler", clip_folder)
    entry, tensors = task.export(params)
    assert entry["separate_last_step"] and set(tensors) == {"first", "last"}
    shown = task.preview(params, {}, batch(), jax.random.key(0), 2)["upsampler_16"]
    assert shown.shape == (2, 3, 16, 16, 3)


TEXT = dict(context_length=8, vocab_size=520, width=16, depth=1, heads=2)


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("prior", {"task__embedding_scale": 17.2}, "embedding_scale=17.2 must be 1 where z_img is"),
        ("prior", {"task__candidates": 0}, "candidates must be a whole number from 1, not 0"),
        ("decoder", {"model__unit_length": True}, "False: set --config.model.unit_length=False"),
        ("decoder", {"model__text": TEXT}, "config.model.text is a text encoder of the decoder's"),
        (
            "upsampler",
            {"task__learns": ("frist",)},
            r"learns=\('frist',\) must be \('first', 'la",
        ),
        ("upsampler", {"task__learns": ("first", "first")}, "must be .* or one of them"),
        (
            "upsampler",
            {"task__learns": ("first",), "task__separate_last_step": False},
            "learns goes with separate_last_step",
        ),
        ("upsampler", {"task__sampling__steps": 1}, "steps=1 leaves no step to the first network"),
    ],
)
def test_what_cannot_be_trained_is_refused(stage, change, told, clip_folder):
    with pytest.raises(UserError, match=told):
        build.task(config(stage, clip_folder, **change))


def test_a_clip_without_an_image_tower_is_refused(tmp_path, clip_folder):
    """As that of Karlo's text-to-image pipeline."""
    entry = model_folder.read_stage(clip_folder, "clip")
    tensors = model_folder.read_params(clip_folder, "clip")
    del tensors["image_tower"]
    entry["model"]["image"] = None
    model_folder.write_stage(tmp_path, "clip", entry, tensors)
    for stage in ("prior", "decoder"):
        with pytest.raises(UserError, match=r"has no image tower, .* name a model that has one"):
            build.task(config(stage, str(tmp_path)))
