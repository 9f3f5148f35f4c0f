"""Model folders: round trips in every storage type, and one clear line for every fault."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.storage import model_folder
from dalle2_jax.storage.model_folder import (
    read_config,
    read_params,
    weights_hash,
    write_stage,
)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 5)).astype(np.float32)
    return {
        "blocks": {"attn": {"kernel": jnp.asarray(kernel), "bias": kernel[0]}},
        "scale": np.float32(3.25),
        "codes": np.arange(4, dtype=np.int32),
        "turned": kernel.T,  # not contiguous
    }


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)],
)
def test_round_trip(tmp_path, params, dtype, stored):
    write_stage(tmp_path / "m", "decoder", {"width": 8}, params, dtype)
    back = read_params(tmp_path / "m", "decoder")
    assert back.keys() == params.keys()

    def check(got, want):
        want = np.asarray(want)
        if want.dtype == np.float32:
            want = want.astype(stored).astype(np.float32)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)

    for name in ("kernel", "bias"):
        check(back["blocks"]["attn"][name], params["blocks"]["attn"][name])
    for name in ("scale", "codes", "turned"):
        check(back[name], params[name])


def test_tensor_names_and_types_on_disk(tmp_path, params):
    write_stage(tmp_path, "prior", {}, params, "bfloat16")
    raw = (tmp_path / "prior.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["blocks.attn.kernel"]["dtype"] == "BF16"
    assert header["codes"]["dtype"] == "I32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "prior.safetensors"]
    assert (tmp_path / "config.json").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_stages_are_merged(tmp_path, params):
    write_stage(tmp_path, "clip", {"width": 1}, params)
    write_stage(tmp_path, "prior", {"width": 2}, params)
    write_stage(tmp_path, "clip", {"width": 3}, params)
    config = read_config(tmp_path)
    assert config["stages"] == {"clip": {"width": 3}, "prior": {"width": 2}}
    assert config["format"] == model_folder.FORMAT


def test_a_failed_write_leaves_the_old_model(tmp_path, params, monkeypatch):
    write_stage(tmp_path, "clip", {"width": 1}, params)
    before = weights_hash(tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_stage(tmp_path, "clip", {"width": 9}, params)
    assert weights_hash(tmp_path) == before
    assert read_config(tmp_path)["stages"]["clip"] == {"width": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.safetensors", "config.json"]


def test_the_hash_identifies_the_weights(tmp_path, params):
    write_stage(tmp_path / "a", "clip", {"width": 1}, params)
    write_stage(tmp_path / "b", "clip", {"width": 1}, params)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    write_stage(tmp_path / "b", "clip", {"width": 1}, params | {"scale": np.float32(3.5)})
    assert weights_hash(tmp_path / "a") != weights_hash(tmp_path / "b")
    assert len(weights_hash(tmp_path / "a")) == 16


def test_missing_things_are_named(tmp_path, params):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(tmp_path)
    write_stage(tmp_path, "clip", {}, params)
    write_stage(tmp_path, "prior", {}, params)
    with pytest.raises(UserError, match="no stage 'decoder'; it has: clip, prior"):
        read_params(tmp_path, "decoder")
    (tmp_path / "prior.safetensors").unlink()
    with pytest.raises(UserError, match=r"prior\.safetensors is missing"):
        read_params(tmp_path, "prior")
    with pytest.raises(UserError, match=r"prior\.safetensors"):
        weights_hash(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, params, monkeypatch):
    write_stage(tmp_path, "clip", {}, params)

    def forbidden(path):  # safetensors raises this for a missing read permission
        raise FileNotFoundError(path)

    monkeypatch.setattr(model_folder, "load_file", forbidden)
    with pytest.raises(UserError, match=r"clip\.safetensors may not be read"):
        read_params(tmp_path, "clip")


def test_a_clip_that_other_stages_were_trained_with_is_not_replaced(tmp_path, params):
    write_stage(tmp_path, "clip", {}, params)
    clip_hash = model_folder.stage_hash(tmp_path, "clip")
    write_stage(tmp_path, "prior", {"clip": clip_hash}, params)
    write_stage(tmp_path, "clip", {}, params)  # the same CLIP again
    before = weights_hash(tmp_path)
    for other in ({"dtype": "float16"}, {"params": {"a": np.float32(1)}}):
        with pytest.raises(UserError, match="holds prior, trained with another clip than this"):
            write_stage(tmp_path, "clip", {}, other.pop("params", params), **other)
    assert weights_hash(tmp_path) == before and len(list(tmp_path.iterdir())) == 3
    write_stage(tmp_path, "prior", {"clip": clip_hash}, {"a": np.float32(1)})


def test_temporary_files_of_a_killed_export_are_removed(tmp_path, params):
    old, young = (tmp_path / f".clip.safetensors.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    write_stage(tmp_path, "clip", {}, params)
    assert not old.exists() and young.exists()  # another process may be writing the young one


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_file_cut_short_is_an_error(tmp_path, params, length):
    write_stage(tmp_path, "clip", {}, params)
    path = tmp_path / "clip.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"clip\.safetensors is damaged or cut short"):
        read_params(tmp_path, "clip")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "no 'stages'"),
        ('{"format": 1}', "no 'stages'"),
        ('{"format": 1, "stages": {"clip": 3}}', "not an object"),
        ('{"format": "x", "stages": {}}', "'format' must be a whole number from 1, not 'x'"),
        ("[" * 100_000, "not valid JSON"),
        (
            '{"format": 99, "version": "7.0", "stages": {}}',
            r"format 99, written by .* 7\.0.*upgrade",
        ),
    ],
)
def test_a_broken_config_is_an_error_of_one_line(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path, params):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write model folder"):
        write_stage(tmp_path / "file" / "m", "clip", {}, params)


def test_values_that_cannot_be_stored(tmp_path):
    big = {"a": {"b": np.float32(1e6)}}
    with pytest.raises(UserError, match=r"tensor a\.b is not finite in float16"):
        write_stage(tmp_path, "clip", {}, big, "float16")
    write_stage(tmp_path, "clip", {}, big, "bfloat16")
    with pytest.raises(UserError, match="not finite"):
        write_stage(tmp_path, "clip", {}, {"a": np.float32("nan")})
    with pytest.raises(UserError, match="float64"):
        write_stage(tmp_path, "clip", {}, big, "float64")
    with pytest.raises(ValueError, match="dot"):
        write_stage(tmp_path, "clip", {}, {"a.b": np.float32(1)})
    with pytest.raises(ValueError, match="stage name"):
        write_stage(tmp_path, "../clip", {}, big)
