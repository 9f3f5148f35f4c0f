"""DALLE2: images from prompts, the same alone, in any batch and on any number of devices."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.cli import output
from dalle2_jax.errors import UserError
from dalle2_jax.pipelines import cascade, placement
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.request import Request
from dalle2_jax.storage import model_folder
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.validation.sections import Section

ROOT = Path(__file__).parent.parent
PROMPTS = ["a cat", "dog, flat"]


@pytest.fixture(scope="module")
def model(folder) -> DALLE2:
    return DALLE2.from_pretrained(folder)


@pytest.fixture(scope="module")
def images(model) -> np.ndarray:
    return model.generate(PROMPTS, n=3, seed=7)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two images differ by at most one level of 255.

    Another batch size rounds differently.
    """
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def size_of(arrays) -> int:
    """Returns the bytes of one copy of each array."""
    return sum(x.nbytes for x in arrays)


def test_images_have_the_last_upsamplers_size(model, images):
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8
    assert model.image_size == 16 and jax.device_count() == 8
    assert images.std() > 5  # not blank


def test_a_seed_gives_the_same_images_and_all_images_differ(model, images):
    np.testing.assert_array_equal(model.generate(PROMPTS, n=3, seed=7), images)
    others = [*images, *model.generate(PROMPTS, n=3, seed=8)]
    for i, a in enumerate(others):
        assert not any(close(a, b) for b in others[:i])


def test_weights_that_wait_on_the_host_give_the_same_images(folder, images):
    """And only the weights of the running stage are on the devices."""
    model = DALLE2.from_pretrained(folder, offload=True)
    sizes = {name: size_of(jax.tree.leaves(tree)) for name, tree in model.cascade.params.items()}
    before, seen = size_of(jax.live_arrays()), {}

    def progress(stage, done, steps):
        gc.collect()
        seen[stage] = max(seen.get(stage, 0), size_of(jax.live_arrays()) - before)

    again = model.generate(PROMPTS, n=3, seed=7, progress=progress)
    np.testing.assert_array_equal(again, images)
    batch = 8 * 16 * 16 * 3 * 4  # bytes of a batch of the largest images
    # Beside the weights: x_t, x_0, the condition and noise, and one to spare.
    for stage, size in seen.items():
        assert sizes[stage] <= size < sizes[stage] + 5 * batch
    assert 5 * batch < sizes["decoder"]  # so another stage's weights would be noticed


def test_weights_wait_beyond_half_of_a_devices_memory():
    params = {"prior": {"kernel": np.zeros((4, 8), np.float32), "bias": np.zeros(8, np.float32)}}
    assert placement.should_offload(params, 2 * 160 - 1) and not placement.should_offload(
        params, 2 * 160
    )


def test_an_image_is_the_same_alone_and_in_any_batch(model, images):
    for size in (1, 4, 5, 16):
        assert close(model.generate(PROMPTS, n=3, seed=7, batch_size=size), images)
    assert close(model.generate(PROMPTS[1], n=3, seed=7), images[3:])
    assert close(model.generate(PROMPTS[1], seed=7), images[3:4])
    assert close(model.generate([*PROMPTS, *PROMPTS], n=3, seed=7)[6:], images)


ALONE = """
import sys, numpy as np
import jax
import jax.numpy as jnp
from dalle2_jax import DALLE2
assert jax.device_count() == 1
folder, out, *prompts = sys.argv[1:]
np.save(out, DALLE2.from_pretrained(folder).generate(prompts, n=3, seed=7))
print(*{"tensorflow", "torch", "orbax", "tensorflow_datasets"}.intersection(sys.modules))
"""


def test_one_device_gives_what_eight_give_without_the_trainers_libraries(
    folder,
    images,
    tmp_path,
):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", ALONE, folder, str(tmp_path / "x.npy"), *PROMPTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert close(np.load(tmp_path / "x.npy"), images)


def test_progress_counts_the_steps_of_all_batches(model):
    seen = {}
    model.generate(
        PROMPTS,
        n=8,
        batch_size=8,
        progress=lambda s, done, n: seen.setdefault(s, []).append((done, n)),
    )
    assert list(seen) == ["prior", "decoder", "upsampler_16"]
    for stage, steps in (("prior", 4), ("decoder", 4), ("upsampler_16", 2)):
        assert seen[stage][-1] == (2 * steps, 2 * steps)
        assert seen[stage] == sorted(seen[stage])


def test_settings_are_the_folders_until_changed(model, images):
    before = model.settings()
    assert before["decoder"] == {
        "steps": 4,
        "solver": "ddim",
        "cfg_scale": 2.0,
        "clip": ("static", 1.0),
        "spacing": "",
        "eta": 0.0,
        "variance": "small",
        "cfg_interval": None,
        "cfg_rescale": 0.0,
        "repeats": 1,
    }
    one = model.with_settings(steps=3, cfg_scale=5.0, solver="dpm++")
    assert one.settings()["decoder"]["steps"] == 3 and one.settings()["prior"]["steps"] == 4
    assert one.settings()["decoder"]["cfg_scale"] == 5.0
    assert one.settings()["prior"]["cfg_scale"] == 1.0
    assert {s["solver"] for s in one.settings().values()} == {"dpm++"}
    many = model.with_settings(steps={"prior": 2, "upsampler_16": 1}, solver={"prior": "ddpm"})
    assert [s["steps"] for s in many.settings().values()] == [2, 4, 1]
    assert [s["solver"] for s in many.settings().values()] == ["ddpm", "ddim", "ddim"]
    guided = model.with_settings(
        cfg_interval=np.array([0.5, 3.0]), cfg_rescale={"prior": 0.5}, variance={"decoder": "large"}
    ).settings()
    assert guided["decoder"]["cfg_interval"] == (0.5, 3.0)
    assert guided["prior"]["cfg_interval"] is None and guided["prior"]["cfg_rescale"] == 0.5
    assert [s["variance"] for s in guided.values()] == ["small", "large", "small"]
    assert model.settings() == before and model.with_settings().settings() == before
    assert not close(model.with_settings(steps=3).generate(PROMPTS, n=3, seed=7), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": {"decodr": 3}}, "steps: no stage 'decodr'; did you mean 'decoder'?"),
        ({"cfg_scale": {"upsampler_64": 3.0}}, "did you mean 'upsampler_16'"),
        ({"steps": 0}, "steps must be whole numbers from 1, not 0"),
        ({"steps": 21}, "steps must be at most 20, not 21"),
        ({"steps": 2.5}, "steps must be whole numbers from 1, not 2.5"),
        ({"solver": "ddmp"}, "unknown sampler 'ddmp'; did you mean 'ddpm'"),
        ({"solver": "DDIM"}, "unknown sampler 'DDIM'; did you mean 'ddim'"),
        ({"solver": 5}, "unknown sampler 5; known: ddim, ddpm"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number, not nan"),
        ({"cfg_interval": 3}, "cfg_interval must be null or"),
        ({"cfg_rescale": {"upsampler": 1}}, "cfg_rescale: no stage 'upsampler'; did you mean"),
        ({"variance": "analytic"}, 'variance="analytic" needs x_0_error'),
        ({"cfg_scale": "2"}, "cfg_scale must be a finite number, not '2'"),
        ({"steps": np.int64(21)}, "steps must be at most 20, not 21"),
        ({"steps": np.float32(5)}, "steps must be whole numbers from 1, not 5.0"),
        ({"steps": {0: 3}}, "steps: no stage 0; known: decoder, prior, upsampler_16"),
        ({"solver": ["ddim"]}, "unknown sampler"),
        ({"solver": {"prior": {"ddim"}}}, "unknown sampler"),
        ({"cfg_scale": {"upsampler_16": 3.0}}, "an upsampler has nothing to be guided by"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_generated(model, change, message):
    with pytest.raises(UserError, match=message):
        model.with_settings(**change)


def test_numpy_scalars_are_accepted(model):
    one = model.with_settings(np.int64(3), np.float32(2.5), np.str_("dpm++")).settings()
    assert one == model.with_settings(3, 2.5, "dpm++").settings()
    json.dumps(one)  # as an image's metadata is
    sections = {"decoder": [np.int32(2), 1]}
    assert model.with_settings(sections).settings()["decoder"]["steps"] == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ""}, "a prompt is empty"),
        ({"prompts": ["a", "  "]}, "a prompt is empty"),
        ({"prompts": []}, "a prompt is empty"),
        ({"prompts": None}, "there is nothing to generate: give prompts, z_img or both"),
        ({"prompts": 3}, "prompts must be a text or a list of texts, not 3"),
        ({"prompts": ["a", 1]}, "prompts must be a text or a list of texts"),
        ({"prompts": "a", "n": 0}, "n must be a whole number from 1 to 4294967296, not 0"),
        ({"prompts": "a", "n": "2"}, "n must be a whole number .* not '2'"),
        ({"prompts": "a", "n": True}, "n must be a whole number .* not True"),
        ({"prompts": "a", "batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ({"prompts": "a", "seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
        ({"prompts": "a", "seed": 1.5}, "seed must be a whole number"),
        ({"prompts": "a", "seed": 2**32}, "not 4294967296"),
        ({"prompts": "a", "seed": [1, 2]}, "2 seeds for 1 prompts: give one for each"),
        ({"prompts": ["a", "b"], "seed": [1, -2]}, "seed must be a whole number .* not -2"),
        ({"prompts": ["a", "b"], "seed": [1, [2, 3]]}, r"seed must be a whole .* not \[2, 3\]"),
        ({"prompts": ["a", "b"], "seed": np.ones((2, 2), int)}, "seed must be a whole number"),
        ({"prompts": "a", "z_img": [["x"] * 16]}, r"z_img must be numbers \[1, 16\]"),
        ({"prompts": "a", "n": 2, "z_img": [[1.0], [1.0, 2.0]]}, r"z_img must be numbers"),
        ({"prompts": "a", "z_img": [[np.nan] * 16]}, r"z_img\[0\] must be finite and not all 0"),
        ({"prompts": "a", "z_img": [[0] * 16]}, r"z_img\[0\] must be finite and not all 0"),
        ({"prompts": "a", "z_img": [[np.inf] + [0] * 15]}, r"z_img\[0\] must be finite"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.generate(**arguments)


def test_the_largest_seed_and_a_long_prompt_are_accepted(model):
    long = "cat " * 100
    assert model.generate(long, seed=2**32 - 1).shape == (1, 16, 16, 3)


def test_z_img_takes_the_priors_place(model, images):
    z_img = model.encode_image(images)
    assert z_img.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(z_img, axis=1), 1, atol=1e-5)
    decoded = model.generate(PROMPTS, n=3, seed=7, z_img=z_img, batch_size=4)
    assert not close(decoded, images)
    longer = z_img * np.linspace(0.5, 1e30, 6)[:, None]  # only the direction counts
    assert close(model.generate(PROMPTS, n=3, seed=7, z_img=longer, batch_size=4), decoded)
    for i in (1, 5):  # image i is decoded from row i
        alone = model.generate(PROMPTS[i // 3], n=3, seed=7, z_img=np.stack([z_img[i]] * 3))
        assert close(alone[i % 3], decoded[i])
    with pytest.raises(UserError, match=r"z_img must be \[6, 16\], not \[1, 16\]"):
        model.generate(PROMPTS, n=3, z_img=z_img[:1])


def test_every_prompt_may_have_a_seed_of_its_own(model, images):
    both = model.generate(PROMPTS, n=3, seed=np.array([8, 7]))
    assert close(model.generate(PROMPTS, n=3, seed=np.array(7)), images)
    assert close(both[3:], images[3:]) and not close(both[:3], images[:3])
    assert close(both[:3], model.generate(PROMPTS[0], n=3, seed=8))


def test_the_middle_of_an_image_is_encoded(model, images):
    wide = np.concatenate([255 - images[:, :, :5], images, images[:, :, :5]], axis=2)
    np.testing.assert_allclose(model.encode_image(wide), model.encode_image(images), atol=1e-6)
    for wrong in (images / 127.5 - 1, images[0], images[..., :1]):
        with pytest.raises(UserError, match=r"images must be uint8 \[b, h, w, 3\], not .* \["):
            model.encode_image(wrong)
    with pytest.raises(UserError, match=r"images is empty, uint8 \[0, 16, 16, 3\]"):
        model.encode_image(images[:0])
    with pytest.raises(UserError, match="all of its rows of one length"):
        model.encode_image([images[0], images[0, :8]])


def test_batches_come_as_they_are_done(model, images):
    # A batch size of 1 is rounded up to 8, one image a device: all six images are one batch.
    batches = model.stream(PROMPTS, n=3, seed=7, batch_size=1)
    np.testing.assert_array_equal(next(batches), images)
    assert next(batches, None) is None
    without_end = model.stream(PROMPTS[0], n=10**9, seed=7)  # no array is as long as n
    assert close(next(without_end)[:3], images[:3])


def test_a_decoder_with_its_own_text_encoder_reads_its_own_tokens(model, tmp_path, capsys):
    text = dict(context_length=20, vocab_size=600, width=8, depth=1, heads=1)
    network = dataclasses.replace(
        model.cascade.decoder.network, text=Section(text), context_length=20
    )
    decoder = dataclasses.replace(model.cascade.decoder, network=network)
    changed = dataclasses.replace(model.cascade, decoder=decoder)
    captions = changed.captions(["a cat", "dog"])
    np.testing.assert_array_equal(captions.clip, model.cascade.tokenizer(["a cat", "dog"]))
    np.testing.assert_array_equal(captions.decoder, Tokenizer(20, 600)(["a cat", "dog"]))
    inputs = network.init_inputs(text_width=16)
    params = {**changed.params, "decoder": network.init(jax.random.key(0), *inputs)["params"]}
    other = DALLE2(dataclasses.replace(changed, params=params))
    assert other.generate("a cat").shape == (1, 16, 16, 3)
    for one, message in (
        (other, "CLIP reads only 'a cat fa', the decoder all of it"),
        (model, "only 'a cat fa' is read"),
    ):
        output.write(one, Request(prompts=("a cat face", "a cat")), tmp_path)
        notes = [n for n in capsys.readouterr().err.splitlines() if n.startswith("note")]
        assert len(notes) == 1 and message in notes[0]


def test_stages_have_different_keys():
    two = np.arange(2, dtype=np.uint32)
    keys = cascade._keys(np.zeros_like(two), two, ["prior", "decoder", "a", "b"])
    data = [tuple(row) for key in keys.values() for row in np.asarray(jax.random.key_data(key))]
    assert len(set(data)) == 8


def test_without_upsamplers_the_decoders_images_come_out(model):
    small = model.at_size(8)
    assert small.generate("a cat").shape == (1, 8, 8, 3)
    assert set(small.settings()) == {"prior", "decoder"}


def test_a_missing_stage_or_folder_is_an_error(tmp_path, folder):
    entry = model_folder.read_stage(folder, "clip")
    model_folder.write_stage(tmp_path / "m", "clip", entry, {"x": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="has no stage 'decoder'; it has: clip"):
        DALLE2.from_pretrained(str(tmp_path / "m"))
    with pytest.raises(UserError, match="nowhere"):
        DALLE2.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="weights must be 'tiny', a model folder or a hub id, not"):
        DALLE2.from_pretrained(None)


def test_the_model_says_where_it_comes_from(model, folder):
    assert model.weights == folder
    assert model.weights_hash == model_folder.weights_hash(folder)


def test_weights_are_kept_in_the_dtype_that_networks_compute_in():
    """bfloat16 halves the memory; vectors stay float32, and shapes are cast as arrays are."""
    tree = {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}
    halved = placement.cast(tree, "bfloat16")
    assert halved["kernel"].dtype == jnp.bfloat16 and halved["bias"].dtype == np.float32
    assert placement.cast(tree, "float32")["kernel"] is tree["kernel"]
    shapes = placement.cast(jax.eval_shape(lambda: tree), "bfloat16")
    assert shapes["kernel"] == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
