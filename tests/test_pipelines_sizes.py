"""Images of other sizes than the last stage's: which stages run, and what they give."""

import json
import shutil

import numpy as np
import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.storage import model_folder


@pytest.fixture(scope="module")
def chain(folder, tmp_path_factory):
    """A model folder whose stages generate 8, then 16, then 32 px."""
    chain = shutil.copytree(folder, tmp_path_factory.mktemp("chain") / "model")
    changes = dict(task__low_size=16, task__image_size=32)
    changes |= dict(model__residual=True, diffusion__prediction="x_0")
    task = build.task(small_cascade.config("upsampler", **changes))
    params = small_cascade.random_params(task.init, seed=9)
    model_folder.write_stage(chain, task.stage, *task.export(params))
    return chain


@pytest.fixture(scope="module")
def largest(chain):
    return DALLE2.from_pretrained(chain)


def area(images, size):
    """Averages blocks of images [n, s, s, 3] to [n, size, size, 3], in numpy."""
    n, side = images.shape[:2]
    f = side // size
    blocks = images.astype(float).reshape(n, size, f, size, f, 3)
    return blocks.mean(axis=(2, 4))


def test_a_size_between_is_the_next_larger_averaged_down(largest):
    images = {size: largest.at_size(size).generate("a cat", n=2, seed=1) for size in (8, 16, 32)}
    assert {size: x.shape[1:] for size, x in images.items()} == {
        size: (size, size, 3) for size in images
    }
    np.testing.assert_array_equal(largest.generate("a cat", n=2, seed=1), images[32])
    # No stage generates 24 or 12 px: 24 px are averaged from the last stage's 32, 12 px from 16.
    for size, stage_size in ((24, 32), (12, 16)):
        smaller = largest.at_size(size).generate("a cat", n=2, seed=1)
        assert smaller.shape == (2, size, size, 3)
        # Averaged to 4 px, which divides both sizes, they show the same but for rounding.
        assert np.abs(area(smaller, 4) - area(images[stage_size], 4)).max() < 1


def test_only_the_stages_that_a_size_needs_are_loaded(chain, tmp_path, largest):
    folder = shutil.copytree(chain, tmp_path / "model")
    (folder / "upsampler_32.safetensors").write_bytes(b"not read")
    small = DALLE2.from_pretrained(folder, size=16)
    assert (
        list(small.cascade.upsamplers) == ["upsampler_16"]
        and "upsampler_32" not in small.cascade.params
    )
    same = largest.at_size(16).generate("a cat", seed=3)
    np.testing.assert_array_equal(small.generate("a cat", seed=3), same)
    with pytest.raises(UserError, match="upsampler_32"):
        DALLE2.from_pretrained(folder, size=17)
    (folder / "upsampler_16.safetensors").write_bytes(b"nor this")
    assert DALLE2.from_pretrained(folder, size=8).image_size == 8
    with pytest.raises(UserError, match="upsampler_16"):
        DALLE2.from_pretrained(folder, size=9)


def test_the_size_is_the_folders_unless_the_user_gives_one(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def default(size):
        (folder / "config.json").write_text(json.dumps(config | {"image_size": size}))
        return DALLE2.from_pretrained(folder)

    assert default(16).image_size == 16 and list(default(16).cascade.upsamplers) == ["upsampler_16"]
    assert default(12).image_size == 12
    assert DALLE2.from_pretrained(folder, size=32).image_size == 32
    for wrong, message in ((64, "from 8 to 32 px"), ("16", "image_size must be a whole number")):
        with pytest.raises(UserError, match=message):
            default(wrong)
    # A stage exported later leaves the default as it is.
    default(16)
    entry = config["stages"]["upsampler_32"]
    params = model_folder.read_params(folder, "upsampler_32")
    model_folder.write_stage(folder, "upsampler_32", entry, params)
    assert DALLE2.from_pretrained(folder).image_size == 16


@pytest.mark.parametrize("size", [7, 33, 0, -8, 16.0, "16", True])
def test_a_wrong_size_is_one_line(size, chain, largest):
    for model_of in (largest.at_size, lambda size: DALLE2.from_pretrained(chain, size=size)):
        with pytest.raises(UserError, match="size") as error:
            model_of(size)
        assert "\n" not in str(error.value)


def test_inversion_and_variations_work_at_any_size(largest):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    for size in (8, 12, 32):
        model = largest.at_size(size)
        assert model.reconstruct(images).shape == (2, size, size, 3)
        assert model.variations(images, n=2, seed=1).shape == (4, size, size, 3)
    small = largest.at_size(8).reconstruct(images)
    middle = largest.at_size(16).reconstruct(images)
    assert small.shape != middle.shape and small.std() > 5


def test_settings_are_kept(largest):
    model = largest.with_settings(steps={"decoder": 3, "upsampler_32": 1}).at_size(12)
    assert model.with_settings(cfg_scale=1.0).image_size == 12
    assert model.settings()["decoder"]["steps"] == 3 and "upsampler_32" not in model.settings()


def test_flops_are_those_of_the_stages_that_run(largest):
    from dalle2_jax.aot.sampling import flops_by_stage

    flops = flops_by_stage(largest.cascade, 2)
    assert set(flops) == {"clip", "prior", "decoder", "upsampler_16", "upsampler_32"}
    assert set(flops_by_stage(largest.at_size(9).cascade, 2)) == set(flops) - {"upsampler_32"}
    # The same network at twice the side, but for the time's embedding.
    assert flops["upsampler_32"] == pytest.approx(4 * flops["upsampler_16"], rel=0.1)
    assert flops_by_stage(largest.cascade, 4)["decoder"] == pytest.approx(
        2 * flops["decoder"], rel=0.01
    )
    steps = largest.with_settings(steps={"upsampler_32": 4})
    assert flops_by_stage(steps.cascade, 2)["upsampler_32"] == 2 * flops["upsampler_32"]
