"""The layout of OpenAI's CLIP, which OpenCLIP keeps."""

from __future__ import annotations

from dalle2_jax.pretrained.names import CONV, DENSE, MATRIX, NORM, SAME, beside, module, within

LAYERS = [
    *module("ln_1", "norm1", NORM),
    ("attn.in_proj_weight", ["q.kernel", "k.kernel", "v.kernel"], MATRIX),
    ("attn.in_proj_bias", ["q.bias", "k.bias", "v.bias"], SAME),
    *module("attn.out_proj", "out", DENSE),
    *module("ln_2", "norm2", NORM),
    *module("mlp.c_fc", "fc1", DENSE),
    *module("mlp.c_proj", "fc2", DENSE),
]
CLIP = [
    ("visual.class_embedding", "image_tower.cls", beside(2)),
    ("visual.conv1.weight", "image_tower.patch.kernel", CONV),
    ("visual.positional_embedding", "image_tower.positions", SAME),
    *module("visual.ln_pre", "image_tower.norm_in", NORM),
    *within("visual.transformer.resblocks.{l}.", "image_tower.transformer.blocks.", LAYERS),
    *module("visual.ln_post", "image_tower.norm", NORM),
    ("visual.proj", "image_tower.projection.kernel", SAME),
    ("token_embedding.weight", "text_tower.token.embedding", SAME),
    ("positional_embedding", "text_tower.positions", SAME),
    *within("transformer.resblocks.{l}.", "text_tower.transformer.blocks.", LAYERS),
    *module("ln_final", "text_tower.norm", NORM),
    ("text_projection", "text_tower.projection.kernel", SAME),
    ("logit_scale", "logit_scale", SAME),
    # what the tensors' shapes tell as well, and a triangle of minus infinity
    ("input_resolution", (), SAME),
    ("context_length", (), SAME),
    ("vocab_size", (), SAME),
    ("attn_mask", (), SAME),
    ("transformer.resblocks.{l}.attn_mask", (), SAME),
]
