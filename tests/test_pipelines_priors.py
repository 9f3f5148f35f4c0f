"""The choice of a prior, in folders with both, one or none, and what probing its PCA shows."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import small_cascade
from tolerance import ROUNDED

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2, Latents
from dalle2_jax.pipelines.embeddings import normalise, project
from dalle2_jax.storage import model_folder

PROMPTS = ["a cat", "dog, flat"]
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
STEPS = 5


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> str:
    """A folder with all stages and both priors."""
    return small_cascade.write(
        tmp_path_factory.mktemp("both") / "model", (*small_cascade.CONFIGS, "ar_prior")
    )


def without(folder, path, *stages) -> str:
    """Copies a model folder to `path`, without these stages in its config.json."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    for stage in stages:
        del config["stages"][stage]
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def model(both) -> DALLE2:
    return DALLE2.from_pretrained(both)


@pytest.fixture(scope="module")
def small(model) -> DALLE2:
    """A model without upsamplers: its images are those of the decoder that is inverted."""
    return model.at_size(8)


def apart(a, b) -> int:
    """Returns the largest difference between two images, in levels of 255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_a_prior_is_chosen_by_name(model):
    z = {n: model.with_prior(n).sample_prior(PROMPTS, 2, 3) for n in ("diffusion", "ar")}
    for name, z_img in z.items():
        assert z_img.shape == (4, model.cascade.clip.dim)
        np.testing.assert_allclose(np.linalg.norm(z_img, axis=1), 1, rtol=1e-5)
        images = model.with_prior(name).generate(PROMPTS, 2, 3)
        assert apart(images, model.generate(PROMPTS, 2, 3, z_img=z_img)) <= ROUNDED
    assert np.abs(z["ar"] - z["diffusion"]).max() > 0.01
    np.testing.assert_array_equal(z["diffusion"], model.sample_prior(PROMPTS, 2, 3))  # the default


def test_none_is_the_captions_own_embedding(model):
    z_txt = model.encode_text(PROMPTS)
    z = model.with_prior("none").sample_prior(PROMPTS, 2)
    np.testing.assert_allclose(z, np.repeat(z_txt, 2, axis=0), atol=1e-6)
    images = model.with_prior("none").generate(PROMPTS, 2, 3)
    assert apart(images, model.generate(PROMPTS, 2, 3, z_img=z_txt)) <= ROUNDED
    assert list(model.with_prior("none").settings()) == ["no_prior", "decoder", "upsampler_16"]


def test_none_has_the_length_of_karlos_z_img(tmp_path):
    """The statistics of Karlo's diffusion prior say which, as its CLIP's have no unit length."""
    folder, changes = tmp_path / "model", small_cascade.KARLO
    stages = small_cascade.written_with(folder, changes, ("clip", "prior", "decoder", "upsampler"))
    model = DALLE2.from_pretrained(stages)
    prior = model_folder.read_params(folder, "prior")
    length = np.sqrt((prior["mean"] ** 2 + prior["std"] ** 2).sum())
    z = model.with_prior("none").sample_prior(PROMPTS)
    np.testing.assert_allclose(z, normalise(model.encode_text(PROMPTS)) * length, rtol=1e-4)


def test_the_ar_prior_samples_the_same_alone_and_in_any_batch(model):
    model = model.with_prior("ar")
    z_img = model.sample_prior(PROMPTS, 3, 7)
    np.testing.assert_allclose(model.sample_prior(PROMPTS, 3, 7, batch_size=1), z_img, atol=1e-5)
    np.testing.assert_allclose(model.sample_prior(PROMPTS[1], 3, 7), z_img[3:], atol=1e-5)
    assert np.abs(z_img[0] - z_img[1]).max() > 1e-3
    assert np.abs(model.sample_prior(PROMPTS, 3, 8) - z_img).max() > 1e-3


def test_settings_are_those_of_the_chosen_prior(model):
    chosen = model.with_prior("ar")
    assert list(chosen.settings()) == ["ar_prior", "decoder", "upsampler_16"]
    guided = chosen.with_settings(cfg_scale={"ar_prior": 3.0}, solver="ddpm", steps=3)
    assert guided.settings()["ar_prior"]["cfg_scale"] == 3.0
    assert guided.settings()["decoder"]["solver"] == guided.settings()["upsampler_16"]["solver"]
    # Choosing the present prior again keeps its settings.
    assert guided.with_prior("ar").settings() == guided.settings()
    assert model.with_prior(None) == model
    seen = []
    chosen.generate("a cat", progress=lambda *event: seen.append(event))
    assert seen[:2] == [("ar_prior", 0, 6), ("ar_prior", 6, 6)]


def test_an_ar_prior_alone_serves_and_without_any_prior_none_does(both, tmp_path):
    alone = DALLE2.from_pretrained(without(both, tmp_path / "ar", "prior"))
    assert next(iter(alone.cascade.samplers())) == "ar_prior"
    assert alone.generate("a cat").shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match=r"prior=.diffusion.: .*/ar has only 'ar' and 'none'"):
        alone.with_prior("diffusion")
    nothing = DALLE2.from_pretrained(without(both, tmp_path / "no", "prior", "ar_prior"))
    with pytest.raises(UserError, match="/no has no prior, which samples z_img"):
        nothing.generate("a cat")
    assert nothing.with_prior("none").generate("a cat").shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.with_prior("art"), "prior must be one of .*, not 'art'; did you mean 'ar'"),
        (lambda m: m.with_prior(3), "prior must be one of 'diffusion', 'ar', 'none', not 3"),
        (
            lambda m: m.with_prior("ar").with_settings(steps={"ar_prior": 3}),
            "steps is no setting of ar_prior, but of decoder",
        ),
        (
            lambda m: m.with_prior("none").with_settings(solver={"no_prior": "ddim"}),
            "solver is no setting of no_prior, but of",
        ),
        (
            lambda m: m.with_prior("ar").with_settings(cfg_scale={"ar_prior": "x"}),
            "cfg_scale must be a finite number, not 'x'",
        ),
        (
            lambda m: m.with_prior("ar").generate("a", noise={"ar_prior": np.zeros(3)}),
            "noise: ar_prior takes no noise: it samples from the seed alone",
        ),
        (lambda m: m.probe(IMAGE, [7]), "dims must be a whole number from 0 to 6, not 7"),
        (lambda m: m.probe(IMAGE, []), "dims must list how many directions are kept"),
        (lambda m: m.probe(IMAGE, 5), "dims must list how many directions are kept"),
        (lambda m: m.probe(IMAGE[None]), r"image must be uint8 \[h, w, 3\]"),
        (lambda m: m.probe(IMAGE, steps=99), "steps must be at most 20"),
    ],
)
def test_wrong_arguments_are_one_line(model, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model", "dims", 5), "ar_prior.safetensors holds another network"),
        (("model", "width", "a"), "config.json: ar_prior: no network can be built so"),
        (
            ("sampling", "top_p", 2),
            "config.json: ar_prior: top_p must be a number from 1e-06 to 1, not 2",
        ),
        (("sampling", "steps", 2), "config.json: ar_prior: unknown key 'steps'"),
    ],
)
def test_a_damaged_entry_is_an_error(both, tmp_path, change, message):
    path = tmp_path / "model"
    without(both, path)
    config = json.loads((path / "config.json").read_text())
    section, key, value = change
    config["stages"]["ar_prior"][section][key] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        DALLE2.from_pretrained(str(path))
    assert "\n" not in str(error.value)


def test_probing_ends_at_the_reconstruction_and_starts_at_the_mean(small):
    frames = small.probe(IMAGE, [0, 2, 6, None], steps=STEPS)
    assert frames.shape == (4, 8, 8, 3)
    z_img, x_T = small.invert(IMAGE[None], steps=STEPS)
    again = small.reconstruct(IMAGE[None], steps=STEPS)[0]
    assert apart(frames[-1], again) <= ROUNDED
    statistics = small.cascade.params["ar_prior"]["statistics"]
    mean, components = (np.asarray(statistics[name]) for name in ("mean", "components"))
    assert apart(frames[0], small.decode(Latents(mean[None], x_T), steps=STEPS)[0]) <= ROUNDED
    two = mean + (z_img - mean) @ components[:2].T @ components[:2]
    assert apart(frames[1], small.decode(Latents(two, x_T), steps=STEPS)[0]) <= ROUNDED
    assert apart(frames[1], frames[2]) > 2


def test_projecting_keeps_the_part_along_the_directions():
    rng = np.random.default_rng(0)
    mean, basis = rng.standard_normal(8), np.linalg.qr(rng.standard_normal((8, 8)))[0]
    z = rng.standard_normal((5, 8))
    np.testing.assert_allclose(project(z, mean, basis), z, atol=1e-5)
    np.testing.assert_allclose(project(z, mean, basis[:0]), np.repeat(mean[None], 5, 0), atol=1e-6)
    projected = project(z, mean, basis[:3])
    along = (z - mean) @ basis[:3].T
    np.testing.assert_allclose((projected - mean) @ basis[:3].T, along, atol=1e-5)
    np.testing.assert_allclose((projected - mean) @ basis[3:].T, 0, atol=1e-5)
    np.testing.assert_allclose(project(projected, mean, basis[:3]), projected, atol=1e-5)


def test_probing_needs_the_statistics(folder):
    model = DALLE2.from_pretrained(folder)
    with pytest.raises(UserError, match="has no ar_prior, which holds the directions") as error:
        model.probe(IMAGE)
    assert "\n" not in str(error.value)


def test_without_dims_it_goes_by_twenties_to_all(model):
    assert model.probe_dims() == [6, None]  # the prior has 6 directions
    statistics = model.cascade.params["ar_prior"]["statistics"] | {"components": np.eye(65, 70)}
    params = {**model.cascade.params, "ar_prior": {"statistics": statistics}}
    large = DALLE2(dataclasses.replace(model.cascade, params=params))
    assert large.probe_dims() == [20, 40, 60, 65, None]
