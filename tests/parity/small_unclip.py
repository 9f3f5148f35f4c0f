"""Karlo's pipelines at small width with random weights, as diffusers makes and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip import (
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UnCLIPTextProjModel,
)

from dalle2_jax.tokenizer import FULL_VOCAB_SIZE, vocabulary

DIM, CONTEXT = 32, 77
CONTEXT_WIDTH = 40


def tokenizer(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    vocab, merges = vocabulary(FULL_VOCAB_SIZE)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = transformers.CLIPTokenizer.from_pretrained(str(folder), pad_token="!")
    found.model_max_length = CONTEXT
    return found


def shaken(module: Any) -> Any:
    """With no parameter or statistic left at zero or one, where two would look alike."""
    with torch.no_grad():
        for x in module.state_dict().values():
            if x.is_floating_point():
                x += 0.1 * torch.randn_like(x)
        if hasattr(module, "conv_out"):  # as of a trained one: near what noise is, or steps explode
            module.conv_out.weight *= 0.1
            module.conv_out.bias *= 0.1
    return module.eval()


def text_encoder(**changed: Any) -> Any:
    return shaken(
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                hidden_size=DIM,
                intermediate_size=128,
                projection_dim=DIM,
                num_hidden_layers=3,
                num_attention_heads=2,
                vocab_size=FULL_VOCAB_SIZE,
                bos_token_id=FULL_VOCAB_SIZE - 2,
                eos_token_id=FULL_VOCAB_SIZE - 1,
                max_position_embeddings=CONTEXT,
                **changed,
            )
        )
    )


def image_encoder(**changed: Any) -> Any:
    return shaken(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=40,
                intermediate_size=100,
                projection_dim=DIM,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                **changed,
            )
        )
    )


def prior() -> Any:
    return shaken(
        diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            embedding_dim=DIM,
            num_embeddings=CONTEXT,
        )
    )


def text_proj() -> Any:
    return shaken(
        UnCLIPTextProjModel(
            clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=CONTEXT_WIDTH
        )
    )


def decoder() -> Any:
    return shaken(
        diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            down_block_types=(
                "ResnetDownsampleBlock2D",
                "SimpleCrossAttnDownBlock2D",
                "SimpleCrossAttnDownBlock2D",
            ),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(
                "SimpleCrossAttnUpBlock2D",
                "SimpleCrossAttnUpBlock2D",
                "ResnetUpsampleBlock2D",
            ),
            block_out_channels=(32, 64, 96),
            layers_per_block=2,
            cross_attention_dim=CONTEXT_WIDTH,
            attention_head_dim=16,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
    )


def upsampler() -> Any:
    return shaken(
        diffusers.UNet2DModel(
            sample_size=32,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=2,
            add_attention=False,
        )
    )


def schedulers() -> dict[str, Any]:
    cls = diffusers.UnCLIPScheduler
    return {
        "decoder_scheduler": cls(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": cls(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


def text_to_image(folder: Path) -> Any:
    """The pipeline, saved in `folder`."""
    torch.manual_seed(0)
    made = UnCLIPPipeline(
        prior=prior(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder=decoder(),
        text_proj=text_proj(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder.with_name("tokenizer")),
        super_res_first=upsampler(),
        super_res_last=upsampler(),
        **schedulers(),
    )
    made.save_pretrained(folder)
    return made


def image_variations(folder: Path) -> Any:
    """The pipeline, saved in `folder`."""
    torch.manual_seed(1)
    made = UnCLIPImageVariationPipeline(
        decoder=decoder(),
        text_proj=text_proj(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder.with_name("tokenizer")),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        image_encoder=image_encoder(),
        super_res_first=upsampler(),
        super_res_last=upsampler(),
        **schedulers(),
    )
    made.save_pretrained(folder)
    return made
