"""Inpainting and outpainting: parts of images regenerated, images extended beyond their sides."""

import dataclasses

import jax
import numpy as np
import pytest
import small_cascade
from tolerance import ROUNDED

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.evals import seams
from dalle2_jax.pipelines import cascade, edits
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.events import Batch
from dalle2_jax.storage import model_folder

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
RIGHT = np.arange(16)[None].repeat(16, 0) >= 8
SHARP = {"feather": 0}


@pytest.fixture(scope="module")
def plain(folder) -> DALLE2:
    """A model that was not trained to inpaint."""
    return DALLE2.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, folder) -> DALLE2:
    """The same networks, with layers that read the known part of an image."""
    inpainting = tmp_path_factory.mktemp("inpainting") / "model"
    for stage, name in (("clip", "clip"), ("prior", "prior")):
        task = build.task(small_cascade.config(stage, str(folder)))
        entry, params = task.export(model_folder.read_params(folder, name))
        model_folder.write_stage(inpainting, name, entry, params)
    for stage in ("decoder", "upsampler"):
        task = build.task(small_cascade.config(stage, str(inpainting), model__inpaints=True))
        params = model_folder.read_params(folder, task.stage)
        fresh = jax.jit(task.init)(jax.random.key(9))["unet"]["conv_known"]
        assert not np.asarray(fresh["kernel"]).any() and list(fresh) == ["kernel"]
        noise = np.random.default_rng(1).standard_normal(fresh["kernel"].shape)
        params["unet"]["conv_known"] = {"kernel": np.float32(0.3 * noise)}
        model_folder.write_stage(inpainting, task.stage, *task.export(params))
    return DALLE2.from_pretrained(str(inpainting))


def apart(a, b) -> int:
    """Returns the largest difference between two images, in levels of 255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("name", ["model", "plain"])
def test_only_the_edit_mask_is_regenerated(name, request):
    model = request.getfixturevalue(name)
    assert model.inpaints is (name == "model")
    edited = model.inpaint(IMAGE, RIGHT, "a cat", n=3, seed=1, **SHARP)
    assert edited.shape == (3, 16, 16, 3)
    assert apart(edited[:, :, :8], IMAGE[None, :, :8]) == 0
    assert all(apart(edited[i, :, 8:], edited[j, :, 8:]) > 8 for i in range(3) for j in range(i))
    again = model.inpaint(IMAGE, RIGHT, "a cat", n=3, seed=1, batch_size=1, **SHARP)
    # Each is the same in any batch, but for rounding of the decoder's image and the upsampler's.
    assert apart(edited, again) <= 2 * ROUNDED
    other = model.inpaint(IMAGE, RIGHT, "dog, flat", n=3, seed=1, **SHARP)
    assert apart(edited, other) > 8
    soft = model.inpaint(IMAGE, RIGHT, "a cat", n=3, seed=1, feather=2)
    assert apart(soft[:, :, :8], edited[:, :, :8]) == 0
    assert apart(soft[:, :, 10:], edited[:, :, 10:]) == 0
    assert apart(soft[:, :, 8:10], edited[:, :, 8:10]) > 0


def test_the_regenerated_part_depends_on_the_kept_one(model):
    other = IMAGE.copy()
    other[:, :8] = 255 - other[:, :8]
    a, b = (model.inpaint(p, RIGHT, "a cat", seed=1, **SHARP) for p in (IMAGE, other))
    assert apart(a[:, :, 8:], b[:, :, 8:]) > 8
    hidden = IMAGE.copy()
    hidden[:, 8:] = 0  # pixels under the mask have no influence
    assert apart(a, model.inpaint(hidden, RIGHT, "a cat", seed=1, **SHARP)) == 0


def test_with_all_pixels_in_the_mask_it_is_generate(model, plain):
    everything = np.ones((16, 16), bool)
    for one in (model, plain):
        edited = one.inpaint(IMAGE, everything, "a cat", n=2, seed=3)
        if one is model:
            assert apart(edited, one.generate("a cat", n=2, seed=3)) <= ROUNDED
        assert apart(edited[0], IMAGE) > 8


def test_without_known_pixels_the_layers_that_read_them_change_nothing(model, plain):
    """Weights that are fine-tuned to inpaint then generate whole images as well as before."""
    a, b = (m.generate("a cat", n=2, seed=3) for m in (model, plain))
    assert apart(a, b) <= ROUNDED  # these are two programs


def test_without_a_prompt_it_shows_what_the_image_shows(model):
    edited = model.inpaint(IMAGE, RIGHT, seed=1, **SHARP)
    other = model.inpaint(255 - IMAGE, RIGHT, seed=1, **SHARP)
    assert edited.shape == (1, 16, 16, 3) and apart(edited[:, :, 8:], other[:, :, 8:]) > 8


def test_an_image_of_another_shape_is_cut_to_its_middle(model):
    wide = np.pad(IMAGE, ((0, 0), (4, 4), (0, 0)))
    mask = np.pad(RIGHT, ((0, 0), (4, 4)))
    a = model.inpaint(wide, mask, "a cat", seed=1)
    np.testing.assert_array_equal(a, model.inpaint(IMAGE, RIGHT, "a cat", seed=1))


@pytest.mark.parametrize("sides", [{"right": 10}, {"left": 3, "up": 20}, dict(left=9, down=9)])
def test_an_image_is_extended_and_kept(model, sides):
    full = {side: sides.get(side, 0) for side in ("left", "right", "up", "down")}
    extended = model.outpaint(IMAGE, "a cat", n=2, seed=1, **sides, **SHARP)
    height, width = 16 + full["up"] + full["down"], 16 + full["left"] + full["right"]
    assert extended.shape == (2, height, width, 3)
    inner = extended[:, full["up"] :, full["left"] :][:, :16, :16]
    assert apart(inner, IMAGE[None]) == 0
    assert apart(extended[0], extended[1]) > 8
    outer = np.ones((height, width), bool)
    outer[full["up"] : full["up"] + 16, full["left"] : full["left"] + 16] = False
    # The canvas is white before its frames are generated. Of what is, 3 % are.
    assert (extended[:, outer] != 255).any(axis=-1).mean() > 0.9


def test_small_images_are_extended_too(model):
    extended = model.outpaint(IMAGE[:1, :1], "a cat", seed=1, right=3)
    assert extended.shape == (1, 1, 4, 3)
    assert model.outpaint(IMAGE[:, :3], None, seed=1, right=30).shape == (1, 16, 33, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.inpaint(IMAGE, RIGHT[:8]), "the mask is 16 x 8, the image 16 x 16"),
        (
            lambda m: m.inpaint(IMAGE, RIGHT.astype(int)),
            r"edit_mask must be bool \[h, w\], ",
        ),
        (lambda m: m.inpaint(IMAGE, ~RIGHT & RIGHT), "the mask leaves nothing to regenerate"),
        (lambda m: m.inpaint(IMAGE[None], RIGHT), r"image must be uint8 \[h, w, 3\]"),
        (lambda m: m.inpaint(IMAGE, RIGHT, ""), "a prompt is empty"),
        (lambda m: m.inpaint(IMAGE, RIGHT, feather=-1), "feather must be a whole number from 0"),
        (lambda m: m.inpaint(IMAGE, RIGHT, ["a", "b"], n=2), "the prompt must be a text, not"),
        (lambda m: m.inpaint(IMAGE, RIGHT, n=10**12), "n must be a whole number from 1 to 10000"),
        (
            lambda m: m.inpaint(IMAGE, [[1, 2], [3]]),
            "edit_mask must be an array, all of its",
        ),
        (lambda m: m.outpaint(IMAGE), "nothing is to be added: give left, right, up or down"),
        (lambda m: m.outpaint(IMAGE, left=-1), "left must be a whole number from 0"),
        (
            lambda m: m.outpaint(IMAGE, left=8, overlap=1),
            "overlap must be a number from 0.01 to 0.99, not 1",
        ),
        (lambda m: m.outpaint(IMAGE, left=10**8), "at most 64 million pixels can be generated"),
        (
            lambda m: next(
                m.cascade.generate("a cat", known_images=np.zeros((1, 8, 8, 4), np.uint8))
            ),
            r"known_images must be uint8 \[1, 16, 16, 4\], not uint8 \[1, 8, 8, 4\]",
        ),
    ],
)
def test_wrong_arguments_are_one_line(model, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", ["diffusion", "none"])
def test_any_prior_serves_inpainting(model, prior):
    edited = model.with_prior(prior).inpaint(IMAGE, RIGHT, "a cat", seed=1, **SHARP)
    assert apart(edited[0, :, :8], IMAGE[:, :8]) == 0 and apart(edited[0], IMAGE) > 8


def test_only_a_decoder_that_was_not_trained_to_inpaint_repeats_steps(model, plain):
    assert edits.for_inpainting(model.cascade) is model.cascade
    other = plain.with_settings(solver={"decoder": "heun"})
    settings = edits.for_inpainting(other.cascade).decoder.settings
    assert (settings.solver, settings.eta, settings.repeats) == ("ddim", 0.0, 5)


def test_upsamplers_generate_both_sides_of_an_edge(model, monkeypatch):
    calls, resize = [], cascade.masks.resize_partly_known

    def record(known_images, *size_and_border):
        calls.append(size_and_border)
        return resize(known_images, *size_and_border)

    monkeypatch.setattr(cascade.masks, "resize_partly_known", record)
    model.inpaint(IMAGE, RIGHT, "a cat")
    assert calls == [(8, 0), (16, 2)]  # the border is one pixel of the small image


def test_all_frames_show_one_z_img(model, monkeypatch):
    decoded = []

    def generate(self, prompts, n, seed, *, z_img, **options):
        decoded.append(z_img)
        return iter([Batch(0, np.zeros((n, 16, 16, 3), np.uint8))])

    monkeypatch.setattr(cascade.Cascade, "generate", generate)
    model.outpaint(IMAGE, "a cat", n=2, seed=1, right=32)
    assert len(decoded) > 2
    expected = model.sample_prior("a cat", n=2, seed=1)
    for z_img in decoded:
        np.testing.assert_array_equal(z_img, expected)


def test_repeated_steps_go_with_ddim_only(plain):
    with pytest.raises(UserError, match="goes with ddim at eta=0, not ddpm at eta=0"):
        dataclasses.replace(plain.cascade.decoder.settings, repeats=5, solver="ddpm")


def test_the_packaged_weights_fit_the_regenerated_part_to_the_kept_one():
    """Halves of one image meet better than those of two images of the same thing."""
    tiny = DALLE2.from_pretrained()
    prompt = "a flat emoji of a red apple"
    image, other = tiny.generate(prompt, n=2, seed=1)
    mask = np.arange(128)[None].repeat(128, 0) >= 64
    tiny = tiny.with_settings(steps=10)
    edited = tiny.inpaint(image, mask, prompt, seed=2, feather=0)
    halves = np.where(mask[..., None], other, image)[None]
    assert seams.measure(edited, mask).across < 0.7 * seams.measure(halves, mask).across
