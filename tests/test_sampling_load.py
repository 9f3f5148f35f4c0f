"""Model folders that do not fit together: one line, before anything is drawn."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.sampling import load


def test_upsamplers_follow_one_another_by_size():
    entries = {
        "clip": {},
        "b": {"low_size": 64, "image_size": 256},
        "a": {"low_size": 16, "image_size": 64},
        "back": {"low_size": 256, "image_size": 16},
    }
    chain = load.upsampler_chain
    assert chain(entries, 16) == ["a", "b", "back"]  # and does not go round for ever
    assert chain({"clip": {}}, 16) == []
    with pytest.raises(UserError, match="a and other both start at 16 px"):
        chain(entries | {"other": {"low_size": 16, "image_size": 32}}, 16)
    with pytest.raises(UserError, match="apart starts at 128 px and no stage ends there"):
        chain(entries | {"apart": {"low_size": 128, "image_size": 512}}, 16)


def changed(key, value=None):
    """An entry's key, "model.dim" for one within a section, set to `value` or (None) removed."""

    def change(entry):
        section, _, name = key.rpartition(".")
        for part in section.split(".") if section else ():
            entry = entry[part]
        if value is None:
            del entry[name]
        else:
            entry[name] = value

    return change


DAMAGES = [
    ("clip", changed("model"), "clip: the key 'model' is missing"),
    ("clip", changed("model.text.vocab_size"), "clip: no network can be built so"),
    ("clip", changed("model.text.width", 32), "holds another network"),
    ("clip", changed("model.activation", "relu"), "clip: no network can be built so"),
    ("clip", changed("model", [1]), r"clip: \[1\] stands where a section should"),
    ("prior", changed("sampling.steps", "25"), "prior.*steps must be whole numbers.*'25'"),
    ("prior", changed("sampling.steps", 21), "prior: steps must be at most 20, not 21"),
    ("prior", changed("model.heads", 7), "prior: no network can be built so"),
    ("prior", changed("model.width", 32), "prior.safetensors holds another network: .*, not "),
    ("decoder", changed("sampling"), "decoder: the key 'sampling' is missing"),
    ("decoder", changed("model.unet.channels"), "decoder: no network can be built so"),
    ("decoder", changed("model.unet.num_blocks", 2), "decoder.safetensors holds another network"),
    ("decoder", changed("model.unet", 5), "decoder: .*"),
    ("decoder", changed("model.context_length", 4), "holds another network: padding is"),
    ("decoder", changed("diffusion.prediction", "x0"), "prediction must be one of"),
    ("decoder", changed("diffusion.learned_variance", True), "decoder: learned_variance is False"),
    ("upsampler_16", changed("image_size", 17), r"multiples of 2, not \(17, 17\)"),
    ("upsampler_16", changed("image_size"), "upsampler_16: the key 'image_size' is missing"),
    ("upsampler_16", changed("low_size", "8"), "upsampler_16 starts at '8' px and no stage ends"),
]


def test_entries_that_tell_too_little_are_told():
    clip = {"model": {"dim": 8, "image": None, "text": {}}}
    for stage, entries, told in [
        ("prior", {}, r"here: .*the key 'prior' is missing"),
        ("prior", {"prior": {}}, r"here: .*the key 'model' is missing"),
        ("decoder", {"decoder": {"model": {"dim": 8}}}, r"here: .*"),
        ("clip", {"clip": {"model": [1]}}, r"here: \[1\] stands where a section should"),
        ("clip", {"clip": clip}, r"here: .*"),
    ]:
        with pytest.raises(UserError, match=rf"^{told}") as error:
            load.expected_params(entries, stage, "here")
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("stage", "change", "told"), DAMAGES)
def test_a_damaged_entry_is_told(stage, change, told, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config["stages"][stage])
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=told) as error:
        DALLE2.from_pretrained(str(tmp_path / "model"))
    assert len(str(error.value).splitlines()) == 1


def test_a_stage_of_another_clip_is_told(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    clip = tmp_path / "model" / "clip.safetensors"
    tensors = load_file(clip)
    save_file({name: np.asarray(tensor * 0.5) for name, tensor in tensors.items()}, clip)
    with pytest.raises(UserError, match="the prior was trained with another CLIP"):
        DALLE2.from_pretrained(str(tmp_path / "model"))


def test_another_stages_tensors_are_told(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    prior = tmp_path / "model" / "prior.safetensors"
    tensors = load_file(prior)
    save_file(tensors | {"more": np.zeros(1, np.float32)}, prior)
    with pytest.raises(UserError, match="holds another network: more is unknown"):
        DALLE2.from_pretrained(str(tmp_path / "model"))
    tensors.pop("query")
    save_file(tensors, prior)
    with pytest.raises(UserError, match="holds another network: query is missing"):
        DALLE2.from_pretrained(str(tmp_path / "model"))
    save_file(load_file(f"{folder}/prior.safetensors"), prior)
    shutil.copy(prior, tmp_path / "model" / "decoder.safetensors")
    with pytest.raises(
        UserError, match=r"decoder.safetensors holds another network: .* and \d+ more"
    ):
        DALLE2.from_pretrained(str(tmp_path / "model"))
