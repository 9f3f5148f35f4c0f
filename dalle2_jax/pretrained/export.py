"""A model folder -> UnCLIPPipeline or UnCLIPImageVariationPipeline, in the layout of diffusers.

What is written is read back as an import would, and must be the same networks: what the other side
has no word for (a learned null, patches) is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dalle2_jax.diffusion.process import Process
from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import names, recognise, sources
from dalle2_jax.pretrained.convert import appearing
from dalle2_jax.sampling import load
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.storage import licence, model_folder
from dalle2_jax.storage.atomic import replacing
from dalle2_jax.tokenizer import EOT, SOT, vocabulary
from dalle2_jax.types import Params

# Settings that diffusers' files do not hold: those of training, those that do not change what the
# network computes, and steps and guidance, which are arguments of a pipeline's call there.
_OURS_ALONE = {
    "dtype", "remat", "dropout", "learned_temperature", "weighting",
    "steps", "cfg_scale", "cfg_interval", "cfg_rescale", "solver", "spacing", "eta",
}  # fmt: skip


def export_model(folder: Path, out: Path) -> None:
    """Writes a model folder as diffusers would save it; `out` appears whole or not.

    Tensors keep their type, and read back they are the same bit for bit. Raises UserError for a
    model that is not one of these pipelines, naming what differs, or that is damaged.
    """
    entries = model_folder.read_config(folder)["stages"]
    for stage in entries:
        load.expected_params(entries, stage, f"{folder}/config.json: {stage}")  # or it is damaged
    with appearing(out) as made:
        try:
            for name, settings in _files(entries, str(folder)):
                text = settings if isinstance(settings, str) else json.dumps(settings, indent=2)
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_text(text + "\n", encoding="utf-8")
            # What was just written is read as an import would read it, before any tensor is: only
            # if the settings come back the same is the model one that diffusers can hold.
            stages = recognise.stages(made)
            for stage in stages:
                entry = entries[stage.name]
                if stage.name == "clip" and _image_tower(stage) is None:
                    entry = {**entry, "model": {**entry["model"], "image": None}}
                _check_same(f"{folder}/config.json: {stage.name}", entry, stage)
        except UserError as error:
            raise UserError(str(error).replace(f"{made}/", f"{folder}, in diffusers' ")) from error
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{folder}/config.json is damaged ({message}): copy it again"
            ) from error
        for stage in stages:
            _write(folder, stage, load.expected_params(entries, stage.name, str(folder)))
        if text := licence.read(folder):
            (made / "LICENSE").write_text(text, encoding="utf-8")


def _write(folder: Path, stage: sources.Stage, expected: Params) -> None:
    """Writes the stage's tensors, one network in memory at a time."""
    source = model_folder.stage_path(folder, stage.name)
    tensors = sources.tensors(source)
    flat: dict[str, Any] = traverse_util.flatten_dict(expected, sep=".")
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    if other := sorted(tensors.keys() ^ shapes.keys()):
        raise UserError(f"{source} holds another network: {other[0]} is unknown or missing")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]()
        if tensor.shape != shapes[name] or not np.isfinite(tensor).all():
            message = f"{name} is {tensor.shape}, not {shapes[name]}, or not finite"
            raise UserError(f"{source} is damaged: {message}")
        return tensor

    ours = tensors.keys() - {"logit_scale"}  # generating does not use it
    if stage.name == "clip" and _image_tower(stage) is None:
        ours = {name for name in ours if not name.startswith("image_tower.")}
    # Names begin with the folder of their network, and the rules keep those of one together.
    named_tensors = names.to_theirs(stage.rules, ours, read)
    for part, network in itertools.groupby(named_tensors, lambda one: one[0].partition("/")[0]):
        theirs = {name.removeprefix(f"{part}/"): tensor for name, tensor in network}
        stem = "model" if part.endswith("_encoder") else "diffusion_pytorch_model"
        path = stage.parts[part] / f"{stem}.safetensors"
        try:
            with replacing(path) as temporary:  # readable for all, as the other files are
                save_file(theirs, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def _image_tower(clip: sources.Stage) -> Any:
    """Returns the image tower of the pipeline's CLIP; None beside a prior.

    UnCLIPPipeline has no place for one, so ours is not exported.
    """
    return clip.entry["model"]["image"]


def _check_same(where: str, ours: Mapping[str, Any], stage: sources.Stage) -> None:
    """Raises UserError unless both entries describe the same network and the same sampling."""
    network = load.network_class(stage.name)
    for section, cls in (("model", network), ("diffusion", Process), ("sampling", Settings)):
        if section in stage.entry:
            said, read = (_filled(cls, entry[section]) for entry in (ours, stage.entry))
            for key in sorted(said.keys() | read.keys()):
                if said.get(key) != read.get(key):
                    message = f"{key} is {said.get(key)!r}, there it can be {read.get(key)!r} alone"
                    raise UserError(f"{where}: in {section}, {message}")


def _filled(cls: Any, section: Any) -> dict[str, Any]:
    """The section as plain values with the defaults of what it leaves out, flat, without what is
    ours alone."""
    fields = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING and field.name not in ("parent", "name")
    }
    flat: dict[str, Any] = {}
    for key, value in {**fields, **section}.items():
        inner = getattr(cls, "SECTIONS", {}).get(key)
        if inner is not None and value is not None:
            flat |= {f"{key}.{name}": v for name, v in _filled(inner, value).items()}
        elif key not in _OURS_ALONE:
            flat[key] = json.loads(json.dumps(value))  # tuples as lists
    return flat


def _files(entries: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(path, its settings or text) of all files but the weights."""
    kind = "UnCLIPPipeline" if "prior" in entries else "UnCLIPImageVariationPipeline"
    for stage in ("clip", "decoder"):
        if stage not in entries:
            raise UserError(f"{where} has no {stage}, which a pipeline of diffusers needs")
    if "prior" not in entries and entries["clip"]["model"].get("image") is None:
        raise UserError(f"{where} has neither a prior nor an image tower: {kind} needs one")
    upsamplers = load.upsampler_chain(entries, entries["decoder"]["image_size"])
    if len(upsamplers) != 1 or not entries[upsamplers[0]].get("separate_last_step"):
        raise UserError(
            f"{where}: {kind} has one upsampler, of two networks (separate_last_step), after the "
            "decoder"
        )
    clip, decoder, upsampler = (entries[s] for s in ("clip", "decoder", upsamplers[0]))
    components = {
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_proj": ("unclip", "UnCLIPTextProjModel"),  # as Karlo's own folder says
        "decoder": ("diffusers", "UNet2DConditionModel"),
        "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
        "super_res_first": ("diffusers", "UNet2DModel"),
        "super_res_last": ("diffusers", "UNet2DModel"),
        "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
    }
    yield from _text(clip["model"])
    if "prior" in entries:
        components["prior"] = ("diffusers", "PriorTransformer")
        components["prior_scheduler"] = ("diffusers", "UnCLIPScheduler")
        yield "prior/config.json", _prior(entries["prior"]["model"])
        yield _scheduler("prior_scheduler", entries["prior"])
    else:
        components["image_encoder"] = ("transformers", "CLIPVisionModelWithProjection")
        components["feature_extractor"] = ("transformers", "CLIPImageProcessor")
        yield from _image(clip["model"])
    yield from _decoder(decoder)
    yield _scheduler("decoder_scheduler", decoder)
    for name in ("super_res_first", "super_res_last"):
        yield (
            f"{name}/config.json",
            {
                "_class_name": "UNet2DModel",
                "in_channels": 6,
                "out_channels": 3,
                "sample_size": upsampler["image_size"],
                "add_attention": False,
                **_unet(upsampler["model"]["unet"]),
            },
        )
    yield _scheduler("super_res_scheduler", upsampler)
    yield "model_index.json", {"_class_name": kind, **components}


def _scheduler(name: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    process, clip = entry["diffusion"], entry["sampling"].get("clip", ["static", 1.0])
    predictions, prediction = {"eps": "epsilon", "x_0": "sample"}, process.get("prediction", "eps")
    if prediction not in predictions:
        raise UserError(f"prediction is {prediction!r}, but UnCLIPScheduler has eps and x_0 alone")
    config = {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": process.get("num_timesteps", 1000),
        "variance_type": "learned_range" if process.get("learned_variance") else "fixed_small_log",
        "prediction_type": predictions[prediction],
        "clip_sample": clip is not None,
        "clip_sample_range": clip[1] if clip else 1.0,
    }
    return f"{name}/scheduler_config.json", config


def _tower(tower: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": model.get("activation", "gelu"),
        "hidden_size": tower["width"],
        "intermediate_size": round(tower.get("mlp_ratio", 4.0) * tower["width"]),
        "layer_norm_eps": 1e-5,
        "num_attention_heads": tower["heads"],
        "num_hidden_layers": tower["depth"],
        "projection_dim": model["dim"],
    }


def _text(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    text = model["text"]
    vocab, merges = vocabulary(text["vocab_size"])
    yield (
        "text_encoder/config.json",
        {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            **_tower(text, model),
            "vocab_size": len(vocab),
            "max_position_embeddings": text["context_length"],
            "bos_token_id": vocab[SOT],
            "eos_token_id": vocab[EOT],
            "pad_token_id": 0,
        },
    )
    yield "tokenizer/vocab.json", json.dumps(vocab, ensure_ascii=False)
    yield "tokenizer/merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)])
    yield (
        "tokenizer/tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": text["context_length"],
            "bos_token": SOT,
            "eos_token": EOT,
            "unk_token": EOT,
            "pad_token": next(iter(vocab)),
        },
    )


def _image(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    image = model["image"]
    size = image["image_size"]
    yield (
        "image_encoder/config.json",
        {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **_tower(image, model),
            "image_size": size,
            "patch_size": image["patch_size"],
        },
    )
    yield (
        "feature_extractor/preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_resize": True,
            "resample": 3,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": image["mean"],
            "image_std": image["std"],
        },
    )


def _prior(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": model["heads"],
        "attention_head_dim": model["width"] // model["heads"],
        "num_layers": model["depth"],
        "embedding_dim": model["dim"],
        "num_embeddings": model["context_length"],
        "additional_embeddings": 4,
    }


def _decoder(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model = entry["model"]
    width = model.get("text_projection")
    yield (
        "decoder/config.json",
        {
            "_class_name": "UNet2DConditionModel",
            "in_channels": 3,
            "out_channels": 6,
            "sample_size": entry["image_size"],
            "cross_attention_dim": width,
            "class_embed_type": "identity",
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            **_unet(model["unet"]),
        },
    )
    yield (
        "text_proj/config.json",
        {
            "_class_name": "UnCLIPTextProjModel",
            "clip_extra_context_tokens": model.get("extra_tokens", 4),
            "clip_embeddings_dim": model["dim"],
            "time_embed_dim": 4 * model["unet"]["channels"],
            "cross_attention_dim": width,
        },
    )


def _unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's settings but its inputs and outputs."""
    mults, attended = unet["channel_mults"], unet.get("attention_levels", ())
    simple = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    down = [simple[i in attended] for i in range(len(mults))]
    return {
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": [unet["channels"] * mult for mult in mults],
        "layers_per_block": unet["num_blocks"],
        "attention_head_dim": unet.get("head_channels", 64),
        "norm_num_groups": unet.get("groups", 32),
        "resnet_time_scale_shift": "scale_shift" if unet.get("scale_shift", True) else "default",
    }
