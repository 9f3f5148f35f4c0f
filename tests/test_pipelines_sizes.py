"""Images of other sizes than the last stage's: which stages draw them, and what comes out."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_cascade

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.storage import model_folder


@pytest.fixture(scope="module")
def chain(folder, tmp_path_factory):
    """8 px, then 16, then 32."""
    chain = shutil.copytree(folder, tmp_path_factory.mktemp("chain") / "model")
    changes = dict(task__low_size=16, task__image_size=32)
    changes |= dict(model__residual=True, diffusion__prediction="x_0")
    task = build.task(small_cascade.config("upsampler", **changes))
    params = small_cascade.randomised(task.init(jax.random.key(9)), 9)
    model_folder.write_stage(chain, task.stage, *task.export(params))
    return chain


@pytest.fixture(scope="module")
def largest(chain):
    return DALLE2.from_pretrained(chain)


def area(images, size):
    """The mean of whole blocks, in numpy."""
    n, side = images.shape[:2]
    f = side // size
    blocks = images.astype(float).reshape(n, size, f, size, f, 3)
    return blocks.mean(axis=(2, 4))


def test_a_size_between_is_the_next_larger_averaged_down(largest):
    drawn = {size: largest.at_size(size).generate("a cat", n=2, seed=1) for size in (8, 16, 32)}
    assert {size: x.shape[1:] for size, x in drawn.items()} == {
        size: (size, size, 3) for size in drawn
    }
    np.testing.assert_array_equal(largest.generate("a cat", n=2, seed=1), drawn[32])
    # 24 px is of the last stage, 12 px of the first upsampler: neither is a stage's own.
    for size, by in ((24, 32), (12, 16)):
        found = largest.at_size(size).generate("a cat", n=2, seed=1)
        assert found.shape == (2, size, size, 3)
        # Both averaged to a side that divides both show the same, but for rounding.
        assert np.abs(area(found, 4) - area(drawn[by], 4)).max() < 1


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


def test_the_folder_says_the_size_unless_it_is_asked_for(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def default(size):
        (folder / "config.json").write_text(json.dumps(config | {"image_size": size}))
        return DALLE2.from_pretrained(folder)

    assert default(16).image_size == 16 and list(default(16).cascade.upsamplers) == ["upsampler_16"]
    assert default(12).image_size == 12
    assert DALLE2.from_pretrained(folder, size=32).image_size == 32
    for wrong, told in ((64, "from 8 to 32 px"), ("16", "image_size must be a whole number")):
        with pytest.raises(UserError, match=told):
            default(wrong)
    # A stage exported later leaves the default as it is.
    default(16)
    entry = config["stages"]["upsampler_32"]
    params = model_folder.read_params(folder, "upsampler_32")
    model_folder.write_stage(folder, "upsampler_32", entry, params)
    assert DALLE2.from_pretrained(folder).image_size == 16


@pytest.mark.parametrize("size", [7, 33, 0, -8, 16.0, "16", True])
def test_a_wrong_size_is_one_line(size, chain, largest):
    for draw in (largest.at_size, lambda size: DALLE2.from_pretrained(chain, size=size)):
        with pytest.raises(UserError, match="size") as error:
            draw(size)
        assert "\n" not in str(error.value)


def test_images_are_inverted_and_varied_at_any_size(largest):
    given = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    for size in (8, 12, 32):
        model = largest.at_size(size)
        assert model.reconstruct(given).shape == (2, size, size, 3)
        assert model.variations(given, n=2, seed=1).shape == (4, size, size, 3)
    small = largest.at_size(8).reconstruct(given)
    middle = largest.at_size(16).reconstruct(given)
    assert small.shape != middle.shape and small.std() > 5


def test_settings_are_kept(largest):
    model = largest.with_settings(steps={"decoder": 3, "upsampler_32": 1}).at_size(12)
    assert model.with_settings(cfg_scale=1.0).image_size == 12
    assert model.settings()["decoder"]["steps"] == 3 and "upsampler_32" not in model.settings()


def test_flops_are_those_of_the_stages_that_draw(largest):
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
