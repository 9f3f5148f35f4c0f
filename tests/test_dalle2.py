"""DALLE2: pictures from sentences, the same alone, in any batch and on any number of devices."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax import dalle2, model_folder
from dalle2_jax.dalle2 import DALLE2
from dalle2_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PROMPTS = ["a cat", "dog, flat"]


@pytest.fixture(scope="module")
def model(folder) -> DALLE2:
    return DALLE2.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(model) -> np.ndarray:
    return model.generate(PROMPTS, n=3, seed=7)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """One level of 255 apart at most: another batch size rounds otherwise."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_pictures_have_the_last_upsamplers_size(model, pictures):
    assert pictures.shape == (6, 16, 16, 3) and pictures.dtype == np.uint8
    assert model.image_size == 16 and jax.device_count() == 8
    assert pictures.std() > 5  # not blank


def test_the_same_seed_draws_the_same_and_all_pictures_differ(model, pictures):
    np.testing.assert_array_equal(model.generate(PROMPTS, n=3, seed=7), pictures)
    others = [*pictures, *model.generate(PROMPTS, n=3, seed=8)]
    for i, a in enumerate(others):
        assert not any(close(a, b) for b in others[:i])


def test_a_picture_is_the_same_alone_and_in_any_batch(model, pictures):
    for size in (1, 4, 5, 16):
        assert close(model.generate(PROMPTS, n=3, seed=7, batch_size=size), pictures)
    assert close(model.generate(PROMPTS[1], n=3, seed=7), pictures[3:])
    assert close(model.generate(PROMPTS[1], seed=7), pictures[3:4])
    assert close(model.generate([*PROMPTS, *PROMPTS], n=3, seed=7)[6:], pictures)


ALONE = """
import sys, numpy as np
import jax
from dalle2_jax import DALLE2
assert jax.device_count() == 1
folder, out, *prompts = sys.argv[1:]
np.save(out, DALLE2.from_pretrained(folder).generate(prompts, n=3, seed=7))
print(*{"tensorflow", "torch", "orbax", "tensorflow_datasets"}.intersection(sys.modules))
"""


def test_one_device_draws_what_eight_draw_without_the_trainers_libraries(
    folder,
    pictures,
    tmp_path,
):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", ALONE, folder, str(tmp_path / "x.npy"), *PROMPTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert close(np.load(tmp_path / "x.npy"), pictures)


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


def test_settings_are_the_folders_until_changed(model, pictures):
    before = model.settings()
    assert before["decoder"] == {
        "steps": 4,
        "solver": "ddim",
        "cfg_scale": 2.0,
        "clip": ("static", 1.0),
        "spacing": "",
    }
    one = model.with_settings(steps=3, cfg_scale=5.0, solver="dpm++")
    assert one.settings()["decoder"]["steps"] == 3 and one.settings()["prior"]["steps"] == 4
    assert one.settings()["decoder"]["cfg_scale"] == 5.0
    assert one.settings()["prior"]["cfg_scale"] == 1.0
    assert {s["solver"] for s in one.settings().values()} == {"dpm++"}
    many = model.with_settings(steps={"prior": 2, "upsampler_16": 1}, solver={"prior": "ddpm"})
    assert [s["steps"] for s in many.settings().values()] == [2, 4, 1]
    assert [s["solver"] for s in many.settings().values()] == ["ddpm", "ddim", "ddim"]
    assert model.settings() == before and model.with_settings().settings() == before
    drawn = model.generate(PROMPTS, n=3, seed=7, steps=3)
    assert not close(drawn, pictures)
    assert close(model.with_settings(steps=3).generate(PROMPTS, n=3, seed=7), drawn)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": {"decodr": 3}}, "steps: no stage 'decodr'; did you mean 'decoder'?"),
        ({"cfg_scale": {"upsampler_64": 3.0}}, "did you mean 'upsampler_16'"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"steps": 21}, "steps must be at most 20, not 21"),
        ({"solver": "ddmp"}, "unknown sampler 'ddmp': did you mean 'ddpm'"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_drawn(model, change, told):
    with pytest.raises(UserError, match=told):
        model.with_settings(**change)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompts": ""}, "a prompt is empty"),
        ({"prompts": ["a", "  "]}, "a prompt is empty"),
        ({"prompts": []}, "a prompt is empty"),
        ({"prompts": "a", "n": 0}, "n=0 and batch_size=8 must be 1 or more"),
        ({"prompts": "a", "batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"prompts": "a", "seed": -1}, "seed=-1 must lie within 0 and"),
        ({"prompts": "a", "seed": 2**32}, "seed=4294967296 must lie within"),
    ],
)
def test_wrong_arguments_are_told(model, arguments, told):
    with pytest.raises(UserError, match=told):
        model.generate(**arguments)


def test_the_largest_seed_and_a_long_prompt_are_drawn(model):
    long = "cat " * 100
    assert model.generate(long, seed=2**32 - 1).shape == (1, 16, 16, 3)


def test_upsamplers_follow_one_another_by_size():
    entries = {
        "clip": {},
        "b": {"low_size": 64, "image_size": 256},
        "a": {"low_size": 16, "image_size": 64},
        "apart": {"low_size": 128, "image_size": 512},
        "back": {"low_size": 256, "image_size": 16},
    }
    assert dalle2._chain(entries, 16) == ["a", "b", "back"]  # and does not go round for ever
    assert dalle2._chain(entries, 128) == ["apart"]
    assert dalle2._chain(entries, 32) == []
    with pytest.raises(UserError, match="a and other both start at 16 px"):
        dalle2._chain(entries | {"other": {"low_size": 16, "image_size": 32}}, 16)


def test_without_upsamplers_the_decoders_pictures_come_out(model):
    small = dataclasses.replace(model, upsamplers={})
    assert small.generate("a cat").shape == (1, 8, 8, 3)
    assert set(small.settings()) == {"prior", "decoder"}


def test_a_missing_stage_or_folder_is_told(tmp_path, folder):
    entry = model_folder.read_stage(folder, "clip")
    model_folder.write_stage(tmp_path / "m", "clip", entry, {"x": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="has no stage 'prior'; there is: clip"):
        DALLE2.from_pretrained(str(tmp_path / "m"))
    with pytest.raises(UserError, match="nowhere"):
        DALLE2.from_pretrained(str(tmp_path / "nowhere"))


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


def deaf(entry):
    return entry | {"model": entry["model"] | {"context_length": 4}}


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("clip", lambda entry: without(entry, "model"), r"clip: the key 'model' is missing"),
        ("decoder", lambda entry: without(entry, "sampling"), r"decoder.*'sampling' is missing"),
        ("decoder", deaf, "the decoder reads 4 tokens and CLIP 8"),
    ],
)
def test_a_damaged_entry_is_told(stage, change, told, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["stages"][stage] = change(config["stages"][stage])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        DALLE2.from_pretrained(str(tmp_path / "model"))


def test_the_model_says_where_it_comes_from(model, folder):
    assert model.weights == folder
    assert model.weights_hash == model_folder.weights_hash(folder)
