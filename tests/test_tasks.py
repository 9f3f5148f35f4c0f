"""Every task: its loss learns one batch, drops what it should, and its export builds it again."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_cascade
from small_cascade import CONFIGS, batch, config, random_params

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays, degradation
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.storage import model_folder
from dalle2_jax.validation.sections import construct

NETWORKS = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return small_cascade.write(tmp_path_factory.mktemp("clip") / "model", ["clip"])


def make(stage: str, clip_folder: str, **changes):
    return build.task(config(stage, clip_folder, **changes))


_compiled = {}


def loss_of(task, params, key=0, train=True, **change) -> float:
    if (id(task), train) not in _compiled:  # the task is kept too, or its id might be used again
        _compiled[id(task), train] = jax.jit(lambda *a: task.loss(*a, train)[0]), task
    loss, _ = _compiled[id(task), train]
    return float(loss(params, task.frozen(), {**batch(), **change}, jax.random.key(key)))


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_loss_of_one_batch_falls(stage, clip_folder):
    task = make(stage, clip_folder)
    params, frozen = jax.jit(task.init)(jax.random.key(0)), task.frozen()

    @jax.jit
    def step(params, frozen, batch, key):
        grad = jax.value_and_grad(lambda p: task.loss(p, frozen, batch, key, True), has_aux=True)
        (loss, metrics), grads = grad(params)
        scale = 0.3 / jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)) + 1e-12)
        return jax.tree.map(lambda p, g: p - scale * g, params, grads), loss, metrics

    losses = []
    for _ in range(8):
        params, loss, metrics = step(
            params, frozen, batch(), jax.random.key(3)
        )  # one noise: the same problem
        losses.append(float(loss))
        assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("stage", CONFIGS)
def test_export_builds_the_same_network_again(stage, clip_folder, tmp_path):
    task = make(stage, clip_folder)
    params = random_params(task.init)
    entry, tensors = task.export(params)
    model_folder.write_stage(tmp_path, task.stage, entry, tensors)
    back = model_folder.read_params(tmp_path, task.stage)
    read = model_folder.read_config(tmp_path)["stages"][task.stage]
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert construct(NETWORKS[stage], read["model"], stage) == task.network
    if stage != "clip":
        assert construct(type(task.process), read["diffusion"], stage) == task.process


def test_clip_pairs_are_worth_log_b_at_chance_and_zero_when_told_apart(clip_folder):
    """A network that says the same of everything pays log b (2103.00020, figure 3)."""
    task = make("clip", clip_folder)
    params = random_params(task.init)
    text = params["text_tower"]["projection"]["kernel"]
    params["text_tower"]["projection"]["kernel"] = jnp.zeros_like(text)
    assert loss_of(task, params, train=False) == pytest.approx(np.log(4), rel=1e-5)

    class Knows(CLIP):
        """Each pair of a batch lies along an axis of its own."""

        def __call__(self, images, tokens):
            z = jnp.eye(images.shape[0], self.dim)
            return z, z, jnp.float32(100)

    knows = Knows(**{n: getattr(task.network, n) for n in ("dim", "image", "text")})
    task = dataclasses.replace(task, network=knows)
    assert loss_of(task, params, train=False) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("stage", "drop", "image_matters"),
    [
        ("prior", {"task__drop_caption": 1.0}, True),
        ("decoder", {"task__drop_caption": 1.0}, True),
        ("decoder", {"task__drop_caption": 1.0, "model__text": "own"}, True),
    ],
)
def test_a_dropped_caption_does_not_reach_the_network(stage, drop, image_matters, clip_folder):
    if "model__text" in drop:
        text = dict(context_length=8, vocab_size=520, width=16, depth=1, heads=2)
        drop = {**drop, "model__text": text}
    task = make(stage, clip_folder, **drop)
    params = random_params(task.init)
    other = {"tokens": jnp.flip(batch()["tokens"], axis=0)}
    assert loss_of(task, params, **other) == pytest.approx(loss_of(task, params), rel=1e-6)
    keeps = dataclasses.replace(task, drop_caption=0.0)
    for difference in (
        loss_of(task, params, train=False, **other) - loss_of(task, params, train=False),
        loss_of(keeps, params, **other) - loss_of(keeps, params),
    ):
        assert abs(difference) > 1e-5


def test_a_dropped_z_img_does_not_reach_the_decoder(clip_folder):
    task = make("decoder", clip_folder, task__drop_z_img=1.0, task__drop_caption=0.0)
    params = random_params(task.init)
    cut = {**params, **{n: jax.tree.map(lambda p: 9 * p, params[n]) for n in ("null_z_img",)}}
    assert loss_of(task, cut) != pytest.approx(loss_of(task, params), rel=1e-4)
    task = dataclasses.replace(task, drop_z_img=0.0)
    assert loss_of(task, cut) == pytest.approx(loss_of(task, params), rel=1e-6)


def test_a_disturbed_z_img_is_as_near_as_asked(clip_folder):
    """Noise of length l across a unit vector leaves a cosine of 1 / sqrt(1 + l^2)."""
    from dalle2_jax.tasks.decoder import disturb

    z = np.random.default_rng(0).normal(size=(2000, 512)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    near = np.sum(np.asarray(disturb(jax.random.key(0), z, 1.5)) * z, axis=1)
    length = np.random.default_rng(1).uniform(0, 1.5, 100_000)
    want = np.quantile(1 / np.sqrt(1 + length**2), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(np.quantile(near, [0.1, 0.5, 0.9]), want, atol=0.03)

    task = make("decoder", clip_folder, task__drop_z_img=0.0, task__drop_caption=0.0)
    params = random_params(task.init)
    noisy = dataclasses.replace(task, noise_z_img=1.0)
    assert loss_of(noisy, params, train=False) == loss_of(task, params, train=False)
    assert abs(loss_of(noisy, params) - loss_of(task, params)) > 1e-6


@pytest.mark.parametrize("degradation", ["blur", "bsr", "bsr_light"])
def test_the_upsampler_learns_from_the_same_window_twice_the_smaller_corrupted(degradation):
    sizes = dict(data__image_size=64, task__image_size=64, task__low_size=16)
    task = make("upsampler", "", task__degradation=degradation, task__noise_std=0.0, **sizes)
    y, x = np.mgrid[:64, :64]
    ramps = np.stack([y, x, (y // 4 + x // 4) % 2 * 64], axis=-1) / 40 - 0.8
    images = arrays.to_uint8(jnp.asarray([ramps] * 6))
    low, x_0 = jax.jit(task.corrupted_crops)(images, jax.random.key(0))
    assert (low.shape, x_0.shape) == ((6, 8, 8, 3), (6, 32, 32, 3))
    places = x_0.mean((1, 2))  # of a ramp the mean tells the place
    assert (places.std(axis=0)[:2] > 0.05).all()
    np.testing.assert_allclose(low.mean((1, 2)), places, atol=0.1)
    assert np.abs(low - arrays.resize(x_0, 8, "area")).max() > 1e-3


def test_bsr_sees_what_is_eight_times_larger_at_four_times(monkeypatch):
    """Its blurs and its halving are for factors up to 4; and it costs 120 n^3 an image."""
    seen = []
    bsr = degradation.bsr

    def spy(key, batch_rows, low_size, strength):
        seen.append((batch_rows.shape[1], low_size))
        return bsr(key, batch_rows, low_size, strength)

    monkeypatch.setattr(degradation, "bsr", spy)
    for low_size in (8, 16, 32):
        sizes = dict(data__image_size=64, task__image_size=64, task__low_size=low_size)
        task = make("upsampler", "", task__degradation="bsr_light", **sizes)
        images = batch(image_size=64)["image"]
        low, _ = jax.eval_shape(task.corrupted_crops, images, jax.random.key(0))
        assert low.shape == (4, low_size // 2, low_size // 2, 3)
    assert seen == [(16, 4), (32, 8), (32, 16)]  # of crops of 32 px


def test_a_share_of_the_small_images_stays_true():
    sizes = dict(data__image_size=64, task__image_size=64, task__low_size=16)
    told = dict(task__degradation="bsr_light", task__noise_std=0.0, **sizes)
    images = batch(size=32, image_size=64)["image"]
    for share, low_count, high_count in ((0.0, 32, 32), (0.5, 8, 24), (1.0, 0, 0)):
        task = make("upsampler", "", task__degraded_share=share, **told)
        low, x_0 = jax.jit(task.corrupted_crops)(images, jax.random.key(0))
        error = jnp.abs(low - arrays.resize(x_0, 8, "area")).max((1, 2, 3))
        assert low_count <= (error < 1e-5).sum() <= high_count


@pytest.mark.parametrize("stage", ["decoder", "upsampler"])
def test_what_is_known_has_a_key_of_its_own(stage, clip_folder, monkeypatch):
    """Else masks would go with the times, the noise or the captions that are left out."""
    task = make(stage, clip_folder, model__inpaints=True)
    module, used = sys.modules[type(task).__module__], []

    def spy(key, *arguments, **options):
        used.append(key)
        return uniform(jax.random.clone(key), *arguments, **options)

    def known_in_part(key, *arguments):
        used.insert(0, key)
        return masked(key, *arguments)

    def denoising_loss(process, apply, x_0, key, times=None):
        used.append(key)
        return jnp.float32(0), {}

    uniform, masked = jax.random.uniform, module.known_in_part
    monkeypatch.setattr(jax.random, "uniform", spy)
    monkeypatch.setattr(module, "known_in_part", known_in_part)
    monkeypatch.setattr(module, "denoising_loss", denoising_loss)
    params = jax.eval_shape(task.init, jax.random.key(0))
    task.loss(params, task.frozen(), batch(), jax.random.key(0), True)
    known, *others = (tuple(jax.random.key_data(key).tolist()) for key in used)
    assert others and known not in others


def test_random_shift_moves_and_keeps_the_rest():
    from dalle2_jax.tasks.clip import random_shift

    images = jnp.arange(3 * 6 * 6.0).reshape(3, 6, 6, 1)
    moved = np.asarray(random_shift(jax.random.key(0), images, 2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for image, source in zip(moved, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5)]
        assert any((image == source[i : i + 6, j : j + 6]).all() for i, j in places)


@pytest.mark.parametrize(
    ("stage", "size", "columns"),
    [("clip", 16, 5), ("prior", 16, 5), ("decoder", 8, 2), ("upsampler", 16, 3)],
)
def test_previews_are_images_beside_the_true_ones(stage, size, columns, clip_folder):
    task = make(stage, clip_folder)
    params = random_params(task.init, std=0.05)
    for rows, shown in ((3, 3), (9, 4)):  # of a batch of 4
        (name, image), *rest = task.preview(
            params, task.frozen(), batch(), jax.random.key(1), rows
        ).items()
        assert (name, rest) == (task.stage, [])
        assert image.shape == (shown, columns, size, size, 3) and image.dtype == jnp.uint8
    # the upsampler's true image stands last, the others' first
    place = -1 if stage == "upsampler" else 0
    true = arrays.resize(arrays.to_float(batch()["image"]), size, "area")
    np.testing.assert_array_equal(image[0, place], arrays.to_uint8(true)[0])


def test_the_nearest_images_come_in_order():
    from dalle2_jax.tasks.shared import previews

    angles = np.deg2rad([0, 50, 100, 20, 170])
    z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    images = jnp.arange(5.0)[:, None, None, None] / 4 * jnp.ones((5, 1, 1, 3)) * 2 - 1
    shown = previews.nearest(images, z, np.asarray([z[3], z[4]]))
    grey = [round(value / 63.75) for value in shown[..., 0].ravel()]
    assert grey == [0, 3, 0, 1, 2, 1, 4, 2, 1, 3]


def test_frozen_parameters_are_clips(clip_folder):
    task = make("prior", clip_folder)
    want = model_folder.read_params(clip_folder, "clip")
    jax.tree.map(np.testing.assert_array_equal, task.frozen()["clip"], want)
    assert make("clip", clip_folder).frozen() == {} == make("upsampler", "").frozen()


def test_the_prior_learns_the_scaled_embedding(clip_folder):
    """With a network that says 0, the loss is the mean square of z_img * scale: scale^2 / dim."""
    task = make("prior", clip_folder)
    params = random_params(task.init)
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    assert loss_of(task, params) == pytest.approx(task.embedding_scale**2 / 16, rel=1e-4)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_missing_clip_is_told(stage, tmp_path):
    with pytest.raises(UserError, match=r"config\.clip_from is empty: name the model folder"):
        make(stage, "")
    with pytest.raises(UserError, match="nowhere"):
        make(stage, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 600), ("context_length", 9)])
def test_captions_that_clip_cannot_read_are_refused(key, value, clip_folder):
    change = {f"data__{key}": value}
    with pytest.raises(UserError, match=f"data.{key}={value} but the CLIP .* set --config.data"):
        make("prior", clip_folder, **change)
    with pytest.raises(UserError, match=f"data.{key}={value} but config.model.text has"):
        make("clip", "", **change)


def test_a_vocabulary_that_no_tokenizer_has_is_refused():
    with pytest.raises(
        UserError, match=r"config.data: vocab_size=100: CLIP's merges give from 514"
    ):
        make("clip", "", data__vocab_size=100)


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("solver", "ddin", "unknown sampler 'ddin'; did you mean 'ddim'"),
        ("steps", 5000, "config.task.sampling: steps must be at most 20, not 5000"),
        ("clip", ("statik", 1.0), "config.task.sampling: .*'statik'"),
    ],
)
def test_settings_that_cannot_be_sampled_with_are_refused(stage, key, value, told, clip_folder):
    with pytest.raises(UserError, match=told):
        make(stage, clip_folder, **{f"task__sampling__{key}": value})


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("clip", {"model__image__heads": 3}, "model.image.heads=3 must divide .*width=16"),
        (
            "clip",
            {"model__activation": "gelu2"},
            "activation must be one of .*, not 'gelu2'; did you mean 'gelu'",
        ),
        (
            "clip",
            {"task__max_shift": -1},
            "config.task.max_shift must be a finite number from 0, not -1",
        ),
        ("prior", {"model__heads": 7}, "config.model.heads=7 must divide config.model.width=16"),
        (
            "prior",
            {"model__activation": "gelu2"},
            "activation must be one of .*, not 'gelu2'; did you mean 'gelu'",
        ),
        ("prior", {"model__dim": 8}, "config.model.dim=8 but the CLIP of .* has 16: set --config"),
        ("prior", {"task__drop_caption": 3}, "drop_caption must be a number from 0 to 1, not 3.0"),
        ("decoder", {"model__dim": 128}, "set --config.model.dim=16"),
        ("decoder", {"model__context_length": 12}, "set --config.model.context_length=8"),
        (
            "decoder",
            {"task__drop_z_img": float("nan")},
            "drop_z_img must be a number from 0 to 1, not nan",
        ),
        (
            "decoder",
            {"task__noise_z_img": -1},
            "noise_z_img must be a finite number from 0, not -1",
        ),
        (
            "decoder",
            {"data__image_size": 8},
            "image_size=8 but the CLIP of .* asks for 16: set --con",
        ),
        ("clip", {"data__image_size": 8}, "image_size=8 but config.model.image asks for 16: set"),
        ("upsampler", {"data__image_size": 8}, "image_size=8 but config.task asks for 16: set"),
        (
            "upsampler",
            {"task__sampling__cfg_scale": 2.0},
            "config.task.sampling: an upsampler has not",
        ),
        ("clip", {"batch_size": 1}, "config.batch_size=1: a contrastive loss needs 2 at least"),
        (
            "decoder",
            {"task__drop_caption": "x"},
            "drop_caption must be a number from 0 to 1, not 'x'",
        ),
        ("upsampler", {"task__low_size": 6}, "image_size=16 must be a multiple of .*low_size=6"),
        ("upsampler", {"task__crop_fraction": 0.2}, "makes crops of 3 px: .* multiple of 2"),
        (
            "decoder",
            {"diffusion__learned_variance": True},
            "False in model, True in diff",
        ),
        (
            "upsampler",
            {"task__crop_fraction": 1.5},
            "crop_fraction must be a number from 0 to 1, not 1.5",
        ),
        ("upsampler", {"task__degradation": "bsr_ligt"}, "'bsr_ligt' .* did you mean 'bsr_light'"),
        (
            "upsampler",
            {"model__residual": True},
            "config.model.residual=True goes with config.diffusion.prediction='x_0', not 'v'",
        ),
        *(
            (
                stage,
                {"task__sampling__variance": "analytic", "task__sampling__solver": solver},
                'config.task.sampling.variance="analytic" is a prior\'s alone',
            )
            for stage, solver in (("decoder", "ddpm"), ("upsampler", "dpm++"))
        ),
        (
            "prior",
            {"task__sampling__variance": "analytic", "diffusion__learned_variance": True},
            "False in model, True in diff",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(stage, change, told, clip_folder):
    with pytest.raises(UserError, match=told):
        make(stage, clip_folder, **change)


# Its crops of 6 px suit the network, its whole images do not.
UNDRAWABLE = {"task__low_size": 5, "task__image_size": 15, "task__crop_fraction": 0.4}


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_check_before_training_lets_good_configs_through(stage, clip_folder):
    build.check(config(stage, clip_folder), make(stage, clip_folder))


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("decoder", {"task__image_size": 33}, r"multiples of 2, not \(33, 33\)"),
        ("upsampler", UNDRAWABLE, r"multiples of 2, not \(15, 15\)"),
        ("decoder", {"model__unet__groups": 7}, "[Gg]roups"),
        ("decoder", {"model__unet__dtype": "float32"}, "dtype"),
        ("prior", {"diffusion__weighting": "min_snr"}, "weighting must be 'none', 'min_snr_<"),
        ("upsampler", {"data__vocab_size": 100}, "vocab_size=100: CLIP's merges give from 514"),
        ("upsampler", {"model__unet__channel_mults": ()}, "do not fit together"),
    ],
)
def test_sizes_that_do_not_fit_are_told_before_training(stage, change, told, clip_folder):
    given = config(stage, clip_folder, **change)
    with pytest.raises(UserError, match=told):
        build.check(given, build.task(given))
