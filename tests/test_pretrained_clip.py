"""CLIP alone: what is read of its settings, and what is wrong with them."""

import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from dalle2_jax import DALLE2
from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import names, names_diffusers, names_openai
from dalle2_jax.pretrained.convert import import_model
from dalle2_jax.sampling import load
from dalle2_jax.storage import model_folder

DIM, VOCAB, CONTEXT = 12, 90, 7
RULES = {
    "transformers": [
        *names_diffusers.CLIP_TEXT,
        *names_diffusers.CLIP_IMAGE,
        ("logit_scale", "logit_scale", names.SAME),
    ],
    "open_clip": names_openai.CLIP,
}


def model(activation):
    tower = {"depth": 2, "heads": 2, "mlp_ratio": 3.0}
    image = {"width": 16, "image_size": 8, "patch_size": 4, "resize": "bicubic"}
    image |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    text = {"width": 24, "context_length": CONTEXT, "vocab_size": VOCAB}
    made = {"dim": DIM, "activation": activation, "unit_length": True}
    return made | {"image": tower | image, "text": tower | text}


CONFIGS = {
    "transformers": {
        "config.json": {
            "model_type": "clip",
            "projection_dim": DIM,
            "text_config": {
                "hidden_size": 24,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": CONTEXT,
                "vocab_size": VOCAB,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
        },
        "preprocessor_config.json": {
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "crop_size": 8,
        },
    },
    "open_clip": {
        "open_clip_config.json": {
            "model_cfg": {
                "embed_dim": DIM,
                "vision_cfg": {
                    "width": 16,
                    "layers": 2,
                    "head_width": 8,
                    "mlp_ratio": 3.0,
                    "image_size": 8,
                    "patch_size": 4,
                },
                "text_cfg": {
                    "width": 24,
                    "layers": 2,
                    "heads": 2,
                    "mlp_ratio": 3.0,
                    "context_length": CONTEXT,
                    "vocab_size": VOCAB,
                },
            },
            "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        },
    },
}
WEIGHTS = {"transformers": "model.safetensors", "open_clip": "open_clip_model.safetensors"}
ACTIVATIONS = {"transformers": "quick_gelu", "open_clip": "gelu"}


@pytest.fixture(params=CONFIGS)
def source(request, tmp_path):
    """(kind, folder, our parameters)"""
    kind, folder = request.param, tmp_path / "theirs"
    folder.mkdir()
    for name, config in CONFIGS[kind].items():
        (folder / name).write_text(json.dumps(config))
    shapes = load.expected_params({"clip": {"model": model("gelu")}}, "clip", "test")
    rng = np.random.default_rng(0)
    flat = {
        name: rng.standard_normal(x.shape).astype(np.float32)
        for name, x in traverse_util.flatten_dict(shapes, sep=".").items()
    }
    save_file(dict(names.to_theirs(RULES[kind], flat, flat.__getitem__)), folder / WEIGHTS[kind])
    return kind, folder, flat


def test_settings_and_tensors(source, tmp_path):
    kind, folder, flat = source
    import_model(folder, tmp_path / "ours")
    entry = model_folder.read_stage(tmp_path / "ours", "clip")
    assert entry["model"] == model(ACTIVATIONS[kind])
    params = model_folder.read_params(tmp_path / "ours", "clip")
    found = traverse_util.flatten_dict(params, sep=".")
    assert found.keys() == flat.keys()
    for name, x in flat.items():
        np.testing.assert_array_equal(found[name], x)


def test_it_draws_nothing_by_itself(source):
    with pytest.raises(
        UserError, match="holds clip alone, from which nothing is generated: import it"
    ):
        DALLE2.from_pretrained(str(source[1]))


def test_what_transformers_leaves_out_is_the_smallest_openai_clip(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    from dalle2_jax.pretrained import clip

    (stage,) = clip.stages(tmp_path)
    network = load.network_class("clip")(**stage.entry["model"])
    inputs = network.init_inputs()
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313  # ViT-B/32's
    assert network.image["image_size"] == 224 and network.image["patch_size"] == 32


WRONG = {
    "transformers": [
        (("text_config", "hidden_size"), "wide", "hidden_size is 'wide', not a whole number"),
        (("text_config", "num_attention_heads"), 5, "clip.*"),
        (("vision_config", "hidden_act"), "relu", "hidden_act is 'relu', but this reads"),
        (("projection_dim",), 13, r"is another network: image_tower.projection.kernel is"),
    ],
    "open_clip": [
        (("model_cfg", "vision_cfg", "timm_model_name"), "vit", "timm_model_name is 'vit', but"),
        (("model_cfg", "text_cfg", "hf_model_name"), "xlm", "hf_model_name is 'xlm', but this"),
        (("model_cfg", "multimodal_cfg"), {}, "multimodal_cfg is {}, but this reads None alone"),
        (("model_cfg", "embed_dim"), None, "embed_dim is missing"),
        (("model_cfg", "vision_cfg", "layers"), [3, 4], r"layers is \[3, 4\], not a whole number"),
        (("preprocess_cfg", "mean"), [0.1, "b"], "mean is .* not a list of numbers"),
        (("model_cfg",), 3, "is missing"),
    ],
}


@pytest.mark.parametrize(
    ("source", "keys", "value", "message"),
    [(kind, *case) for kind, cases in WRONG.items() for case in cases],
    indirect=["source"],
)
def test_wrong_settings_are_told_in_one_line(source, tmp_path, keys, value, message):
    kind, folder, _ = source
    path = folder / next(iter(CONFIGS[kind]))
    config = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        import_model(folder, tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


class Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def archive(path, data: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/constants.pkl", b"")
        file.writestr("m/data.pkl", data)
    return path


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pickle.dumps(Harm()), r"pt holds more than weights \(builtins.exec\)"),
        (pickle.dumps([1, 2])[:-3], "is damaged or cut short"),
        (pickle.dumps({"a": 1}), "is another network: 'visual.conv1.weight' is missing"),
    ],
)
def test_an_archive_that_holds_more_or_less_than_weights(tmp_path, data, told):
    with pytest.raises(UserError, match=told):
        import_model(archive(tmp_path / "ViT-B-32.pt", data), tmp_path / "ours")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"a\.pt is no model that is read here"):
        import_model(tmp_path / "a.pt", tmp_path / "ours")
