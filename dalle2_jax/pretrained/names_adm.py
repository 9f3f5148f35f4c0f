"""The layout of guided-diffusion (ADM), which GLIDE and Karlo's own code keep.

Blocks of a U-Net are numbered from its entrance to its exit; q, k and v are one tensor, in which
each head's lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle2_jax.pretrained.names import (
    CONVOLUTION,
    DENSE,
    NORM,
    POINTWISE,
    SAME,
    SKIP,
    Rule,
    feature_major,
    fused,
    head_major,
    module,
    within,
    without,
)

HEAD_CHANNELS = 64  # of every network here; no tensor's shape shows it
GROUPS = 32

RESBLOCK = [
    *module("in_layers.0", "norm1", NORM),
    *module("in_layers.2", "conv1", CONVOLUTION),
    *module("emb_layers.1", "emb", DENSE),
    *module("out_layers.0", "norm2", NORM),
    *module("out_layers.3", "conv2", CONVOLUTION),
    *module("skip_connection", "skip", SKIP),
]
ATTENTION = [
    *module("norm", "norm", NORM),
    *fused("qkv", ["q", "k", "v"], POINTWISE, head_major(3, HEAD_CHANNELS)),
    *fused("encoder_kv", ["context_k", "context_v"], POINTWISE, head_major(2, HEAD_CHANNELS)),
    *module("proj_out", "out", POINTWISE),
]


def unet_section(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Our settings of the U-Net whose tensors have these shapes, by name. KeyError: one that any
    has is missing; ValueError, IndexError: another network's are there."""
    channels = shapes["input_blocks.0.0.weight"][0]
    inputs = {name.split(".")[1] for name in shapes if name.startswith("input_blocks.")}
    # below the last of a level stands what doubles the image, but for the largest
    doubles = [f"output_blocks.{n}.{m}.in_layers.0.weight" for n in inputs for m in (1, 2)]
    levels = 1 + sum(name in shapes for name in doubles)
    blocks, left = divmod(len(inputs), levels)
    firsts = [1 + level * blocks for level in range(levels)]
    widths = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    channels_of_time = shapes["input_blocks.1.0.emb_layers.1.weight"][0] // widths[0]
    if left or any(width % channels for width in widths):
        raise ValueError(f"{len(inputs)} blocks of {widths} channels in {levels} levels")
    return {
        "channels": channels,
        "channel_mults": [width // channels for width in widths],
        "num_blocks": blocks - 1,
        "attention_levels": [
            i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.qkv.weight" in shapes
        ],
        "head_channels": HEAD_CHANNELS,
        "scale_shift": channels_of_time == 2,
        "groups": GROUPS,
    }


def unet(section: Mapping[str, Any]) -> list[Rule]:
    """The rules of a U-Net with such settings (`nets.unet.UNet`), and of its time's embedding."""
    rules = [
        *module("time_embed.0", "time.fc1", DENSE),
        *module("time_embed.2", "time.fc2", DENSE),
        *module("input_blocks.0.0", "unet.conv_in", CONVOLUTION),
        *module("out.0", "unet.norm_out", NORM),
        *module("out.2", "unet.conv_out", CONVOLUTION),
    ]
    for theirs, ours in _blocks(section):
        kind = ATTENTION if "attention" in ours else RESBLOCK
        rules += within(f"{theirs}.", f"unet.{ours}.", kind)
    return rules


def _blocks(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(their number of a block, our name)"""
    levels, blocks = len(section["channel_mults"]), section["num_blocks"]
    attention = section["attention_levels"]
    if attention:
        yield "middle_block.1", "middle_attention"
    yield "middle_block.0", "middle_block0"
    yield f"middle_block.{2 if attention else 1}", "middle_block1"
    for level in range(levels):
        down = 1 + level * (blocks + 1)
        up = (levels - 1 - level) * (blocks + 1)
        places = [(f"input_blocks.{down + i}", "down", i) for i in range(blocks)]
        places += [(f"output_blocks.{up + i}", "up", i) for i in range(blocks + 1)]
        for number, way, i in places:
            yield f"{number}.0", f"{way}{level}_block{i}"
            if level in attention:
                yield f"{number}.1", f"{way}{level}_attention{i}"
        if level < levels - 1:
            yield f"input_blocks.{down + blocks}.0", f"down{level}_halve"
        if level > 0:
            last = 2 if level in attention else 1
            yield f"output_blocks.{up + blocks}.{last}", f"up{level}_double"


def conditions(extra_tokens: int) -> list[Rule]:
    """Returns the rules for the layers that give z_img and the caption to Karlo's decoder."""
    return [
        ("cf_param", "null_z_img", SAME),
        *module("text_feat_proj", "emb_txt", DENSE),
        *module("clip_emb", "emb_z_img", DENSE),
        *fused("clip_tok_proj", ["tokens_z_img"], DENSE, feature_major(extra_tokens)),
        *module("text_seq_proj.0", "txt", DENSE),
        *module("text_seq_proj.1", "norm_txt", NORM),
    ]


# Karlo's prior
PRIOR = [
    ("positional_embedding", "positions", without(1)),
    ("prd_emb", "query", SAME),
    *module("time_embed.0", "time.fc1", DENSE),
    *module("time_embed.2", "time.fc2", DENSE),
    *module("clip_img_proj", "x_t", DENSE),
    *module("text_emb_proj", "z_txt", DENSE),
    *module("text_enc_proj", "txt_enc", DENSE),
    *within(
        "transformer.resblocks.{l}.",
        "transformer.blocks.",
        [
            *module("ln_1", "norm1", NORM),
            *fused("attn.c_qkv", ["q", "k", "v"], DENSE, head_major(3, HEAD_CHANNELS)),
            *module("attn.c_proj", "out", DENSE),
            *module("ln_2", "norm2", NORM),
            *module("mlp.c_fc", "fc1", DENSE),
            *module("mlp.c_proj", "fc2", DENSE),
        ],
    ),
    *module("final_ln", "norm", NORM),
    *module("out_proj", "out", DENSE),
]
