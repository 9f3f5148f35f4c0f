"""Karlo's pipelines as diffusers saves them, without torch: the settings of every network at its
real size or a small one, and, for the small one, random weights."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from dalle2_jax.pretrained import names, unclip
from dalle2_jax.sampling import load

REAL = dict(
    dim=768,
    text=(768, 12, 12, 77, 49_408),  # width, depth, heads, context length, vocabulary
    image=(1024, 24, 16, 224, 14),  # width, depth, heads, pixels, of a patch
    prior=(32, 64, 20),  # heads, channels of a head, depth
    unet=((320, 640, 960, 1280), 3, 64, 32),  # widths, blocks, channels of a head, groups
    attention=(False, True, True, True),
    text_projection=1536,
    sizes=(64, 256),
    timesteps=1000,
)
SMALL = dict(
    dim=16,
    text=(16, 1, 2, 8, 520),
    image=(16, 1, 2, 16, 8),
    prior=(2, 8, 1),
    unet=((8, 16), 1, 8, 4),
    attention=(False, True),
    text_projection=12,
    sizes=(8, 16),
    timesteps=30,
)


def settings(kind: str, size: dict) -> dict[str, dict]:
    """folder/file -> what it says."""
    (widths, blocks, head, groups), (small, large) = size["unet"], size["sizes"]

    def tower(width: int, depth: int, heads: int) -> dict:
        shape = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)
        shape |= dict(intermediate_size=4 * width, projection_dim=size["dim"])
        return shape | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)

    def unet(sees: tuple[bool, ...], sample: int) -> dict:
        kinds = {True: "SimpleCrossAttn{}Block2D", False: "Resnet{}sampleBlock2D"}
        blocks_of = [kinds[x] for x in sees]
        up = [name.format("Up") for name in reversed(blocks_of)]
        return dict(
            sample_size=sample,
            down_block_types=[name.format("Down") for name in blocks_of],
            up_block_types=up,
            block_out_channels=list(widths),
            layers_per_block=blocks,
            attention_head_dim=head,
            norm_num_groups=groups,
            act_fn="silu",
            norm_eps=1e-5,
        )

    def scheduler(prediction: str, variance: str, **more: float) -> dict:
        kinds = dict(prediction_type=prediction, variance_type=variance, clip_sample=True)
        kinds |= dict(_class_name="UnCLIPScheduler", num_train_timesteps=size["timesteps"])
        return kinds | {"clip_sample_range": 1.0, **more}

    *text, length, vocab = size["text"]
    *image, pixels, patch = size["image"]
    heads, channels, depth = size["prior"]
    decoder = dict(in_channels=3, out_channels=6, resnet_time_scale_shift="scale_shift")
    decoder |= dict(class_embed_type="identity", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    upsampler = dict(in_channels=6, out_channels=3, add_attention=False)
    upsampler |= unet((False,) * len(widths), large)
    preprocessor = dict(resample=3, do_center_crop=True, do_normalize=True, crop_size=pixels)
    preprocessor |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073])
    preprocessor |= dict(image_std=[0.26862954, 0.26130258, 0.27577711])
    prior = dict(embedding_dim=size["dim"], num_embeddings=length, additional_embeddings=4)
    prior |= dict(num_attention_heads=heads, attention_head_dim=channels, num_layers=depth)
    found = {
        "model_index.json": dict(_class_name=kind),
        "text_encoder/config.json": tower(*text)
        | dict(max_position_embeddings=length, vocab_size=vocab),
        "text_proj/config.json": dict(
            clip_embeddings_dim=size["dim"],
            time_embed_dim=4 * widths[0],
            cross_attention_dim=size["text_projection"],
            clip_extra_context_tokens=4,
        ),
        "decoder/config.json": decoder | unet(size["attention"], small),
        "decoder_scheduler/scheduler_config.json": scheduler("epsilon", "learned_range"),
        "super_res_first/config.json": upsampler,
        "super_res_last/config.json": upsampler,
        "super_res_scheduler/scheduler_config.json": scheduler("epsilon", "fixed_small_log"),
    }
    if kind == "UnCLIPPipeline":
        found["prior/config.json"] = prior
        told = scheduler("sample", "fixed_small_log", clip_sample_range=5.0)
        return found | {"prior_scheduler/scheduler_config.json": told}
    found["image_encoder/config.json"] = tower(*image) | dict(image_size=pixels, patch_size=patch)
    return found | {"feature_extractor/preprocessor_config.json": preprocessor}


def write_settings(folder: Path, kind: str, size: dict) -> Path:
    for name, told in settings(kind, size).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(told), encoding="utf-8")
    return folder


def write(folder: Path, kind: str) -> Path:
    """A small pipeline; both kinds have the same weights, where they have the same networks."""
    stages = list(unclip.stages(write_settings(folder, kind, SMALL)))
    entries = {stage.name: stage.entry for stage in stages}
    for stage in stages:
        shapes = load.expected_params(entries, stage.name, "")
        params = {}
        for name, x in traverse_util.flatten_dict(shapes, sep=".").items():
            noise = np.random.default_rng(sum(name.encode())).normal(size=x.shape)
            params[name] = (1 + 0.2 * np.tanh(noise) if name == "std" else 0.2 * noise).astype("f4")
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in names.to_theirs(stage.rules, params):
            part, _, inner = name.partition("/")
            parts.setdefault(part, {})[inner] = np.ascontiguousarray(jax.device_get(tensor))
        for part, tensors in parts.items():
            save_file(tensors, folder / part / "model.safetensors")
    return folder
