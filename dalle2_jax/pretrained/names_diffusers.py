"""The layouts of diffusers and transformers, their networks' names beside ours."""

from __future__ import annotations

from dalle2_jax.pretrained.names import (
    CONV,
    CONVOLUTION,
    DENSE,
    MATRIX,
    NORM,
    SAME,
    SKIP,
    Rule,
    beside,
    feature_major,
    fused,
    module,
    within,
    without,
)

RESBLOCK = [
    *module("norm1", "norm1", NORM),
    *module("conv1", "conv1", CONVOLUTION),
    *module("time_emb_proj", "emb", DENSE),
    *module("norm2", "norm2", NORM),
    *module("conv2", "conv2", CONVOLUTION),
    *module("conv_shortcut", "skip", SKIP),
]
ATTENTION = [
    *module("group_norm", "norm", NORM),
    *module("to_q", "q", DENSE),
    *module("to_k", "k", DENSE),
    *module("to_v", "v", DENSE),
    *module("add_k_proj", "context_k", DENSE),
    *module("add_v_proj", "context_v", DENSE),
    *module("to_out.0", "out", DENSE),
]
# UNet2DConditionModel and UNet2DModel; their up_blocks begin where the image is smallest
UNET = [
    *module("time_embedding.linear_1", "time.fc1", DENSE),
    *module("time_embedding.linear_2", "time.fc2", DENSE),
    *module("conv_in", "unet.conv_in", CONVOLUTION),
    *within("down_blocks.{i}.resnets.{j}.", "unet.down{i}_block{j}.", RESBLOCK),
    *within("down_blocks.{i}.attentions.{j}.", "unet.down{i}_attention{j}.", ATTENTION),
    *within("down_blocks.{i}.downsamplers.0.", "unet.down{i}_halve.", RESBLOCK),
    *within("mid_block.resnets.{j}.", "unet.middle_block{j}.", RESBLOCK),
    *within("mid_block.attentions.0.", "unet.middle_attention.", ATTENTION),
    *within("up_blocks.{~i}.resnets.{j}.", "unet.up{i}_block{j}.", RESBLOCK),
    *within("up_blocks.{~i}.attentions.{j}.", "unet.up{i}_attention{j}.", ATTENTION),
    *within("up_blocks.{~i}.upsamplers.0.", "unet.up{i}_double.", RESBLOCK),
    *module("conv_norm_out", "unet.norm_out", NORM),
    *module("conv_out", "unet.conv_out", CONVOLUTION),
]


def text_projection(extra_tokens: int) -> list[Rule]:
    """UnCLIPTextProjModel: the inputs z_img and caption of the decoder. Its extra tokens lie
    feature by feature."""
    return [
        ("learned_classifier_free_guidance_embeddings", "null_z_img", SAME),
        *module("embedding_proj", "emb_txt", DENSE),
        *module("clip_image_embeddings_project_to_time_embeddings", "emb_z_img", DENSE),
        *fused(
            "clip_extra_context_tokens_proj", ["tokens_z_img"], DENSE, feature_major(extra_tokens)
        ),
        *module("encoder_hidden_states_proj", "txt", DENSE),
        *module("text_encoder_hidden_states_norm", "norm_txt", NORM),
    ]


# PriorTransformer
PRIOR = [
    ("positional_embedding", "positions", without(1)),
    ("prd_embedding", "query", SAME),
    ("clip_mean", "mean", without(1)),
    ("clip_std", "std", without(1)),
    *module("time_embedding.linear_1", "time.fc1", DENSE),
    *module("time_embedding.linear_2", "time.fc2", DENSE),
    *module("proj_in", "x_t", DENSE),
    *module("embedding_proj", "z_txt", DENSE),
    *module("encoder_hidden_states_proj", "txt_enc", DENSE),
    *within(
        "transformer_blocks.{l}.",
        "transformer.blocks.",
        [
            *module("norm1", "norm1", NORM),
            *module("attn1.to_q", "q", DENSE),
            *module("attn1.to_k", "k", DENSE),
            *module("attn1.to_v", "v", DENSE),
            *module("attn1.to_out.0", "out", DENSE),
            *module("norm3", "norm2", NORM),
            *module("ff.net.0.proj", "fc1", DENSE),
            *module("ff.net.2", "fc2", DENSE),
        ],
    ),
    *module("norm_out", "norm", NORM),
    *module("proj_to_clip_embeddings", "out", DENSE),
]

CLIP_LAYERS = [
    *module("layer_norm1", "norm1", NORM),
    *module("self_attn.q_proj", "q", DENSE),
    *module("self_attn.k_proj", "k", DENSE),
    *module("self_attn.v_proj", "v", DENSE),
    *module("self_attn.out_proj", "out", DENSE),
    *module("layer_norm2", "norm2", NORM),
    *module("mlp.fc1", "fc1", DENSE),
    *module("mlp.fc2", "fc2", DENSE),
]
# CLIPTextModelWithProjection
CLIP_TEXT = [
    ("text_model.embeddings.token_embedding.weight", "text_tower.token.embedding", SAME),
    ("text_model.embeddings.position_embedding.weight", "text_tower.positions", SAME),
    ("text_model.embeddings.position_ids", (), SAME),  # 0, 1, 2, ...: no weights
    *within("text_model.encoder.layers.{l}.", "text_tower.transformer.blocks.", CLIP_LAYERS),
    *module("text_model.final_layer_norm", "text_tower.norm", NORM),
    ("text_projection.weight", "text_tower.projection.kernel", MATRIX),
]
# CLIPVisionModelWithProjection
CLIP_IMAGE = [
    ("vision_model.embeddings.class_embedding", "image_tower.cls", beside(2)),
    ("vision_model.embeddings.patch_embedding.weight", "image_tower.patch.kernel", CONV),
    ("vision_model.embeddings.position_embedding.weight", "image_tower.positions", SAME),
    ("vision_model.embeddings.position_ids", (), SAME),
    *module("vision_model.pre_layrnorm", "image_tower.norm_in", NORM),
    *within("vision_model.encoder.layers.{l}.", "image_tower.transformer.blocks.", CLIP_LAYERS),
    *module("vision_model.post_layernorm", "image_tower.norm", NORM),
    ("visual_projection.weight", "image_tower.projection.kernel", MATRIX),
]
