"""Karlo's networks as their originals make, save and run them; at real size with random weights.

python originals.py FOLDER STAGE writes a stage at real size: FOLDER/PART (the settings of every
part, the weights of the stage's own), and what it makes of what, FOLDER/inputs.npz and
FOLDER/expected.npz. One network is in memory at a time.

torch alone is imported here, JAX in imported.py: the two sides of a comparison can run in
processes of their own. Arrays that pass between them lie as ours do (NHWC).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel

SIDES = (320, 640, 960, 1280)
PIPELINE = UnCLIPPipeline
STAGES = {
    "clip": ["text_encoder", "image_encoder"],
    "prior": ["prior"],
    "decoder": ["text_proj", "decoder"],
    "upsampler": ["super_res_first", "super_res_last"],
}
PIPELINES = {"clip": "UnCLIPImageVariationPipeline"}  # the other one has no image encoder
BATCHES = {"upsampler": 1}  # as an image is drawn; the others are guided by a second row
CLASSES = {
    "text_encoder": transformers.CLIPTextModelWithProjection,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "prior": diffusers.PriorTransformer,
    "text_proj": UnCLIPTextProjModel,
    "decoder": diffusers.UNet2DConditionModel,
    "super_res_first": diffusers.UNet2DModel,
    "super_res_last": diffusers.UNet2DModel,
}
# kakaobrain/karlo-v1-alpha; parameters without the prior's statistics, 2 x 768
PARAMETERS = {
    "text_encoder": 123_650_304,
    "image_encoder": 303_966_208,
    "prior": 1_022_028_544 + 1_536,
    "text_proj": 7_878_400,
    "decoder": 885_439_686,
    "super_res_first": 691_579_523,
    "super_res_last": 691_579_523,
}


def _upsampler() -> Any:
    return diffusers.UNet2DModel(
        sample_size=256,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 4,
        up_block_types=("ResnetUpsampleBlock2D",) * 4,
        block_out_channels=SIDES,
        layers_per_block=3,
        add_attention=False,
    )


def _decoder() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        block_out_channels=SIDES,
        layers_per_block=3,
        cross_attention_dim=1536,
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )


REAL: dict[str, Callable[[], Any]] = {
    "text_encoder": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
        )
    ),
    "image_encoder": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            projection_dim=768,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        )
    ),
    "prior": diffusers.PriorTransformer,
    "text_proj": lambda: UnCLIPTextProjModel(
        clip_embeddings_dim=768, time_embed_dim=1280, cross_attention_dim=1536
    ),
    "decoder": _decoder,
    "super_res_first": _upsampler,
    "super_res_last": _upsampler,
}


def real(part: str) -> Any:
    """The network at real size. Every part of it counts: weights keep what passes through them at
    its scale, no bias is zero and no norm's scale one."""
    drawn = ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_", "xavier_uniform_")
    kept = {name: getattr(torch.nn.init, name) for name in drawn}
    try:
        for name in drawn:  # what is drawn anew below
            setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
        module = REAL[part]()
    finally:
        for name in drawn:
            setattr(torch.nn.init, name, kept[name])
    generator = torch.Generator().manual_seed(sorted(REAL).index(part))
    with torch.no_grad():
        for name, x in module.named_parameters():
            if x.ndim > 1 and len(x) > 1:
                x.normal_(0, x[0].numel() ** -0.5, generator=generator)
            elif x.ndim > 1:
                x.normal_(generator=generator)
            else:
                x.normal_(float(name.endswith(".weight")), 0.1, generator=generator)
    return module.eval()


def write_settings(folder: Path, stage: str) -> None:
    """What a pipeline that holds `stage` is saved with, but for weights."""
    folder.mkdir(parents=True)
    kind = PIPELINES.get(stage, "UnCLIPPipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for part, make in REAL.items():
        with torch.device("meta"):
            module = make()
        if hasattr(module, "save_config"):
            module.save_config(folder / part)
        else:
            module.config.save_pretrained(folder / part)
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    scheduler = diffusers.UnCLIPScheduler
    for name, settings in {
        "prior_scheduler": {"prediction_type": "sample", "clip_sample_range": 5.0},
        "decoder_scheduler": {"variance_type": "learned_range"},
        "super_res_scheduler": {},
    }.items():
        scheduler(**settings).save_config(folder / name)


def other_parts(folder: Path) -> dict[str, Any]:
    """What the pipeline in `folder` has beside networks; it cannot be read whole, for it does not
    find the class of its text_proj where it was not saved by an older diffusers."""
    schedulers = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
    read = diffusers.UnCLIPScheduler.from_pretrained
    found = {name: read(folder / name) for name in schedulers}
    return {**found, "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")}


def inputs(stage: str, settings: Mapping[str, Any], batch: int = 2) -> dict[str, np.ndarray]:
    """Arguments of `run` for parts of these settings (their configs), seeded."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape)).astype(np.float32)

    t = np.array([3, 900] * batch)[:batch]
    n = 77
    mask = np.arange(n)[None] < np.array([[5], [n]] * batch)[:batch]
    if stage == "clip":
        found: dict[str, np.ndarray] = {}
        if "text_encoder" in settings:
            end = settings["text_encoder"].vocab_size - 1
            tokens = rng.integers(1, end - 1, (batch, n))
            tokens[~mask] = 0
            tokens[np.arange(batch), mask.sum(1) - 1] = end
            found["tokens"] = tokens
        if "image_encoder" in settings:
            size = settings["image_encoder"].image_size
            found["images"] = rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
        return found
    if stage == "prior":
        dim = settings["prior"].embedding_dim
        return {"x": normal(dim), "t": t, "z_txt": normal(dim), "hidden": normal(n, dim)} | {
            "mask": mask
        }
    if stage == "decoder":
        size, dim = settings["decoder"].sample_size, settings["text_proj"].clip_embeddings_dim
        return {"x": normal(size, size, 3), "t": t, "z_img": normal(dim), "z_txt": normal(dim)} | {
            "hidden": normal(n, dim),
            "mask": mask,
        }
    size = next(iter(settings.values())).sample_size
    return {"x": normal(size, size, 3), "t": t, "low": normal(size, size, 3)}


def run(stage: str, parts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the stage's networks (by their parts' names) make of torch's tensors `given`.

    Of the decoder's rows the first half is told no z_img, as the pipeline guides it."""
    if stage == "clip":
        found = {}
        if "text_encoder" in parts:
            told = parts["text_encoder"](given["tokens"])
            shown = (given["tokens"] != 0)[..., None]  # past the end nobody looks
            found |= {"z_txt": told.text_embeds, "txt_enc": told.last_hidden_state * shown}
        if "image_encoder" in parts:
            mean, std = (
                torch.tensor(x)[:, None, None]
                for x in (
                    transformers.CLIPImageProcessor().image_mean,
                    transformers.CLIPImageProcessor().image_std,
                )
            )
            pixels = (_channels_first(given["images"]) / 2 + 0.5 - mean) / std
            found["z_img"] = parts["image_encoder"](pixels).image_embeds
        return found
    if stage == "prior":
        out = parts["prior"](
            given["x"],
            timestep=given["t"],
            proj_embedding=given["z_txt"],
            encoder_hidden_states=given["hidden"],
            attention_mask=given["mask"],
        )
        return {"out": out.predicted_image_embedding}
    x = _channels_first(given["x"])
    if stage == "decoder":
        context, added = parts["text_proj"](
            image_embeddings=given["z_img"][len(x) // 2 :],
            prompt_embeds=given["z_txt"],
            text_encoder_hidden_states=given["hidden"],
            do_classifier_free_guidance=True,
        )
        mask = torch.nn.functional.pad(given["mask"], (4, 0), value=True)
        out = parts["decoder"](
            x,
            timestep=given["t"],
            encoder_hidden_states=context,
            class_labels=added,
            attention_mask=mask,
        )
        return {"out": out.sample.permute(0, 2, 3, 1)}
    x = torch.cat([x, _channels_first(given["low"])], dim=1)
    return {
        part: module(x, timestep=given["t"]).sample.permute(0, 2, 3, 1)
        for part, module in parts.items()
    }


def _channels_first(x: Any) -> Any:
    """[b, h, w, c] -> [b, c, h, w], in memory as it was: torch's channels_last."""
    return x.permute(0, 3, 1, 2)


def write_real(folder: Path, stage: str) -> None:
    write_settings(folder, stage)
    together = stage == "decoder"  # the one needs the other
    groups = [STAGES[stage]] if together else [[part] for part in STAGES[stage]]
    given: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for group in groups:
        parts = {part: real(part) for part in group}
        for part, module in parts.items():
            assert sum(x.numel() for x in module.parameters()) == PARAMETERS[part], part
            module.save_pretrained(folder / part)
        settings = {part: module.config for part, module in parts.items()}
        drawn = inputs(stage, settings, BATCHES.get(stage, 2))
        given |= drawn
        with torch.no_grad():
            found = run(stage, parts, {k: torch.tensor(v) for k, v in drawn.items()})
        expected |= {name: x.numpy() for name, x in found.items()}
        del parts, module
    np.savez(folder / "inputs.npz", **given)
    np.savez(folder / "expected.npz", **expected)


if __name__ == "__main__":
    write_real(Path(sys.argv[1]), sys.argv[2])
