"""CLIP alone, to train a prior or a decoder on: OpenAI's, transformers' and OpenCLIP's.

Its encodings are brought to unit length, as training here wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import names_diffusers, names_openai
from dalle2_jax.pretrained.karlo_diffusers import image_tower, text_tower
from dalle2_jax.pretrained.names import SAME, within
from dalle2_jax.pretrained.sources import Config, Stage, network, read_json, sizes_of
from dalle2_jax.pretrained.torchscript import is_archive

# What transformers takes where a config.json says nothing: ViT-B/32.
TEXT: Mapping[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
}
IMAGE: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HEAD_CHANNELS = 64


def is_here(source: Path) -> bool:
    """Returns whether the source is a CLIP alone: of transformers, OpenCLIP or OpenAI."""
    return _reader(source) is not None


def stages(source: Path) -> Iterator[Stage]:
    """The one stage of such a source. UserError: it is another network."""
    if read := _reader(source):
        yield read(source)


def _reader(source: Path) -> Callable[[Path], Stage] | None:
    """Returns the reader of a source; a folder of both kinds is read as transformers'."""
    if source.is_file():
        return openai_stage if is_archive(source) else None
    config = source / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "clip":
        return _transformers
    return _open_clip if (source / OPEN_CLIP).is_file() else None


def _stage(text: Mapping[str, Any], image: Mapping[str, Any], **model: Any) -> dict[str, Any]:
    return {"model": {"unit_length": True, **model, "text": dict(text), "image": dict(image)}}


def _transformers(folder: Path) -> Stage:
    """CLIPModel."""
    whole = Config(folder / "config.json")
    values = whole.values
    text, image = (
        Config(whole.path, {**defaults, **_part(values, key), **_part(values, f"{key}_dict")})
        for key, defaults in (("text_config", TEXT), ("vision_config", IMAGE))
    )
    path = folder / "preprocessor_config.json"
    processor = Config(path, None if path.is_file() else {"image_mean": MEAN, "image_std": STD})
    activation = text.text("hidden_act", "quick_gelu")
    image.expect(hidden_act=activation)
    dim = whole.whole("projection_dim", 512)
    entry = _stage(text_tower(text), image_tower(image, processor), dim=dim, activation=activation)
    rules = [
        *names_diffusers.CLIP_TEXT,
        *names_diffusers.CLIP_IMAGE,
        ("logit_scale", "logit_scale", SAME),
    ]
    return Stage("clip", entry, {"clip": folder}, within("clip/", "", rules))


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _open_clip(folder: Path) -> Stage:
    whole = Config(folder / OPEN_CLIP)
    model = Config(whole.path, _part(whole.values, "model_cfg"))
    prepared = Config(whole.path, _part(whole.values, "preprocess_cfg"))
    text, image = (Config(whole.path, _part(model.values, f"{n}_cfg")) for n in ("text", "vision"))
    model.expect(custom_text=False, multimodal_cfg=None)
    text.expect(hf_model_name=None, pool_type="argmax", embed_cls=False, no_causal_mask=False)
    image.expect(timm_model_name=None, pool_type="tok", attentional_pool=False, no_ln_pre=False)
    prepared.expect(interpolation="bicubic", resize_mode="shortest")
    width = image.whole("width")
    entry = _stage(
        {
            "width": text.whole("width"),
            "depth": text.whole("layers"),
            "heads": text.whole("heads"),
            "mlp_ratio": text.number("mlp_ratio", 4.0),
            "context_length": text.whole("context_length", 77),
            "vocab_size": text.whole("vocab_size", 49408),
        },
        {
            "width": width,
            "depth": image.whole("layers"),
            "heads": width // image.whole("head_width", HEAD_CHANNELS),
            "mlp_ratio": image.number("mlp_ratio", 4.0),
            "image_size": image.whole("image_size"),
            "patch_size": image.whole("patch_size"),
            "mean": prepared.numbers("mean", MEAN),
            "std": prepared.numbers("std", STD),
            "resize": "bicubic",
        },
        dim=model.whole("embed_dim"),
        activation="quick_gelu" if model.values.get("quick_gelu") else "gelu",
    )
    there = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
    part = there[0] if there else folder / OPEN_CLIP_WEIGHTS[0]
    return Stage("clip", entry, {"clip": part}, within("clip/", "", names_openai.CLIP))


def openai_stage(path: Path, unit_length: bool = True) -> Stage:
    """OpenAI's own file (ViT-L-14.pt), whose tensors' shapes tell the sizes. UserError: it is
    another network."""
    shapes: dict[str, Any] = {name: read().shape for name, read in network(path).items()}
    if any(name.startswith("visual.layer1.") for name in shapes):
        raise UserError(f"{path} is a CLIP with a ResNet: its ViT is read here alone")
    with sizes_of(path):
        width, _, patch, _ = shapes["visual.conv1.weight"]
        size = patch * round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
        context_length, text_width = shapes["positional_embedding"]
        entry = _stage(
            {
                **_tower(shapes, text_width, "transformer"),
                "context_length": context_length,
                "vocab_size": shapes["token_embedding.weight"][0],
            },
            {
                **_tower(shapes, width, "visual.transformer"),
                "image_size": size,
                "patch_size": patch,
                "mean": list(MEAN),
                "std": list(STD),
                "resize": "bicubic",
            },
            dim=shapes["text_projection"][1],
            activation="quick_gelu",
            unit_length=unit_length,
        )
    return Stage("clip", entry, {"clip": path}, within("clip/", "", names_openai.CLIP))


def _tower(shapes: Mapping[str, Any], width: int, name: str) -> dict[str, Any]:
    first = shapes[f"{name}.resblocks.0.mlp.c_fc.weight"]
    depth = sum(n.startswith(f"{name}.") and n.endswith(".ln_1.weight") for n in shapes)
    heads = width // HEAD_CHANNELS
    return {"width": width, "depth": depth, "heads": heads, "mlp_ratio": first[0] / width}
