"""Parts of images drawn anew, and images continued beyond their sides."""

import dataclasses

import jax
import numpy as np
import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.evals import seams
from dalle2_jax.pipelines import cascade, edits
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.events import Batch
from dalle2_jax.storage import model_folder

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
RIGHT = np.arange(16)[None].repeat(16, 0) >= 8
SHARP = {"feather": 0}


@pytest.fixture(scope="module")
def untaught(folder) -> DALLE2:
    return DALLE2.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, folder) -> DALLE2:
    """The same networks but for the layers that read what is known."""
    taught = tmp_path_factory.mktemp("taught") / "model"
    for stage, name in (("clip", "clip"), ("prior", "prior")):
        task = build.task(small_cascade.config(stage, str(folder)))
        entry, params = task.export(model_folder.read_params(folder, name))
        model_folder.write_stage(taught, name, entry, params)
    for stage in ("decoder", "upsampler"):
        task = build.task(small_cascade.config(stage, str(taught), model__inpaints=True))
        params = model_folder.read_params(folder, task.stage)
        fresh = jax.jit(task.init)(jax.random.key(9))["unet"]["conv_known"]
        assert not np.asarray(fresh["kernel"]).any() and list(fresh) == ["kernel"]
        noise = np.random.default_rng(1).standard_normal(fresh["kernel"].shape)
        params["unet"]["conv_known"] = {"kernel": np.float32(0.3 * noise)}
        model_folder.write_stage(taught, task.stage, *task.export(params))
    return DALLE2.from_pretrained(str(taught))


def apart(a, b) -> int:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("name", ["model", "untaught"])
def test_what_is_not_marked_is_kept_and_the_rest_drawn(name, request):
    model = request.getfixturevalue(name)
    assert model.inpaints is (name == "model")
    drawn = model.inpaint(PICTURE, RIGHT, "a cat", n=3, seed=1, **SHARP)
    assert drawn.shape == (3, 16, 16, 3)
    assert apart(drawn[:, :, :8], PICTURE[None, :, :8]) == 0
    assert all(apart(drawn[i, :, 8:], drawn[j, :, 8:]) > 8 for i in range(3) for j in range(i))
    again = model.inpaint(PICTURE, RIGHT, "a cat", n=3, seed=1, batch_size=1, **SHARP)
    assert apart(drawn, again) <= 2  # each is the same in any batch
    other = model.inpaint(PICTURE, RIGHT, "dog, flat", n=3, seed=1, **SHARP)
    assert apart(drawn, other) > 8
    soft = model.inpaint(PICTURE, RIGHT, "a cat", n=3, seed=1, feather=2)
    assert apart(soft[:, :, :8], drawn[:, :, :8]) == 0 == apart(soft[:, :, 10:], drawn[:, :, 10:])
    assert apart(soft[:, :, 8:10], drawn[:, :, 8:10]) > 0


def test_the_drawn_part_depends_on_the_kept_one(model):
    other = PICTURE.copy()
    other[:, :8] = 255 - other[:, :8]
    a, b = (model.inpaint(p, RIGHT, "a cat", seed=1, **SHARP) for p in (PICTURE, other))
    assert apart(a[:, :, 8:], b[:, :, 8:]) > 8
    hidden = PICTURE.copy()
    hidden[:, 8:] = 0  # what is under the mask is not seen
    assert apart(a, model.inpaint(hidden, RIGHT, "a cat", seed=1, **SHARP)) == 0


def test_with_everything_marked_it_is_generate(model, untaught):
    everything = np.ones((16, 16), bool)
    for one in (model, untaught):
        drawn = one.inpaint(PICTURE, everything, "a cat", n=2, seed=3)
        if one is model:
            assert apart(drawn, one.generate("a cat", n=2, seed=3)) <= 1
        assert apart(drawn[0], PICTURE) > 8


def test_a_network_told_nothing_is_the_one_that_was_never_taught(model, untaught):
    """So that weights fine-tuned to inpaint draw whole images at no further cost."""
    a, b = (m.generate("a cat", n=2, seed=3) for m in (model, untaught))
    assert apart(a, b) == 0


def test_without_a_prompt_it_shows_what_the_image_shows(model):
    drawn = model.inpaint(PICTURE, RIGHT, seed=1, **SHARP)
    other = model.inpaint(255 - PICTURE, RIGHT, seed=1, **SHARP)
    assert drawn.shape == (1, 16, 16, 3) and apart(drawn[:, :, 8:], other[:, :, 8:]) > 8


def test_an_image_of_another_shape_is_cut_to_its_middle(model):
    wide = np.pad(PICTURE, ((0, 0), (4, 4), (0, 0)))
    mask = np.pad(RIGHT, ((0, 0), (4, 4)))
    a = model.inpaint(wide, mask, "a cat", seed=1)
    np.testing.assert_array_equal(a, model.inpaint(PICTURE, RIGHT, "a cat", seed=1))


@pytest.mark.parametrize("sides", [{"right": 10}, {"left": 3, "up": 20}, dict(left=9, down=9)])
def test_an_image_is_continued_and_kept(model, sides):
    full = {side: sides.get(side, 0) for side in ("left", "right", "up", "down")}
    drawn = model.outpaint(PICTURE, "a cat", n=2, seed=1, **sides, **SHARP)
    height, width = 16 + full["up"] + full["down"], 16 + full["left"] + full["right"]
    assert drawn.shape == (2, height, width, 3)
    inner = drawn[:, full["up"] :, full["left"] :][:, :16, :16]
    assert apart(inner, PICTURE[None]) == 0
    assert apart(drawn[0], drawn[1]) > 8
    outer = np.ones((height, width), bool)
    outer[full["up"] : full["up"] + 16, full["left"] : full["left"] + 16] = False
    assert (drawn[:, outer] != 255).any(axis=-1).mean() > 0.9  # the paper is drawn over


def test_small_images_are_continued_too(model):
    drawn = model.outpaint(PICTURE[:1, :1], "a cat", seed=1, right=3)
    assert drawn.shape == (1, 1, 4, 3)
    assert model.outpaint(PICTURE[:, :3], None, seed=1, right=30).shape == (1, 16, 33, 3)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.inpaint(PICTURE, RIGHT[:8]), "the mask is 16 x 8, the image 16 x 16"),
        (
            lambda m: m.inpaint(PICTURE, RIGHT.astype(int)),
            r"edit_mask must be bool \[h, w\], ",
        ),
        (lambda m: m.inpaint(PICTURE, ~RIGHT & RIGHT), "the mask leaves nothing to regenerate"),
        (lambda m: m.inpaint(PICTURE[None], RIGHT), r"image must be uint8 \[h, w, 3\]"),
        (lambda m: m.inpaint(PICTURE, RIGHT, ""), "a prompt is empty"),
        (lambda m: m.inpaint(PICTURE, RIGHT, feather=-1), "feather must be a whole number from 0"),
        (lambda m: m.inpaint(PICTURE, RIGHT, ["a", "b"], n=2), "the prompt must be a text, not"),
        (lambda m: m.inpaint(PICTURE, RIGHT, n=10**12), "n must be a whole number from 1 to 10000"),
        (
            lambda m: m.inpaint(PICTURE, [[1, 2], [3]]),
            "edit_mask must be an array, all of its",
        ),
        (lambda m: m.outpaint(PICTURE), "nothing is to be added: give left, right, up or down"),
        (lambda m: m.outpaint(PICTURE, left=-1), "left must be a whole number from 0"),
        (
            lambda m: m.outpaint(PICTURE, left=8, overlap=1),
            "overlap must be a number from 0.01 to 0.99, not 1",
        ),
        (lambda m: m.outpaint(PICTURE, left=10**8), "at most 64 million pixels can be generated"),
        (
            lambda m: next(
                m.cascade.generate("a cat", known_images=np.zeros((1, 8, 8, 4), np.uint8))
            ),
            r"known_images must be uint8 \[1, 16, 16, 4\], not uint8 \[1, 8, 8, 4\]",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(model, call, told):
    with pytest.raises(UserError, match=told) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prior", ["diffusion", "none"])
def test_any_prior_says_what_is_drawn(model, prior):
    drawn = model.with_prior(prior).inpaint(PICTURE, RIGHT, "a cat", seed=1, **SHARP)
    assert apart(drawn[0, :, :8], PICTURE[:, :8]) == 0 and apart(drawn[0], PICTURE) > 8


def test_a_model_tells_how_it_draws_parts(model, untaught):
    assert edits.for_inpainting(model.cascade) is model.cascade
    other = untaught.with_settings(solver={"decoder": "heun"})
    settings = edits.for_inpainting(other.cascade).decoder.settings
    assert (settings.solver, settings.eta, settings.repeats) == ("ddim", 0.0, 5)


def test_upsamplers_draw_both_sides_of_an_edge(model, monkeypatch):
    told, resize = [], cascade.masks.resize_partly_known
    monkeypatch.setattr(
        cascade.masks, "resize_partly_known", lambda k, *of: told.append(of) or resize(k, *of)
    )
    model.inpaint(PICTURE, RIGHT, "a cat")
    assert told == [(8, 0), (16, 2)]  # of the ring one pixel of the small image


def test_all_frames_show_what_is_drawn_once(model, monkeypatch):
    asked = []

    def generate(self, prompts, n, seed, *, z_img, **options):
        asked.append(z_img)
        return iter([Batch(0, np.zeros((n, 16, 16, 3), np.uint8))])

    monkeypatch.setattr(cascade.Cascade, "generate", generate)
    model.outpaint(PICTURE, "a cat", n=2, seed=1, right=32)
    assert len(asked) > 2
    wanted = model.sample_prior("a cat", n=2, seed=1)
    for z_img in asked:
        np.testing.assert_array_equal(z_img, wanted)


def test_resampling_goes_with_the_sampler_it_is_made_for(untaught):
    with pytest.raises(UserError, match="goes with ddim at eta=0, not ddpm at eta=0"):
        dataclasses.replace(untaught.cascade.decoder.settings, repeats=5, solver="ddpm")


def test_the_packaged_weights_fit_the_drawn_part_to_the_kept_one():
    """Halves of one thing meet better than those of two images of it."""
    tiny = DALLE2.from_pretrained()
    prompt = "a flat emoji of a red apple"
    image, other = tiny.generate(prompt, n=2, seed=1)
    mask = np.arange(128)[None].repeat(128, 0) >= 64
    tiny = tiny.with_settings(steps=10)
    drawn = tiny.inpaint(image, mask, prompt, seed=2, feather=0)
    halves = np.where(mask[..., None], other, image)[None]
    assert seams.measure(drawn, mask).across < 0.7 * seams.measure(halves, mask).across
