"""Conditions of the networks: dicts of arrays [b, ...] made of z_img and of encoded captions.

Training and sampling build them alike. "No caption" is, for a network that learned a null, a text
mask that shows nothing; for one that did not, the encoding of the empty caption, which the
condition then carries under "empty" for guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dalle2_jax.nets.clip import TextEncoding, text_mask
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.types import Array

Condition = dict[str, Any]


def prior_condition(
    network: DiffusionPrior, text: TextEncoding, empty: TextEncoding | None = None
) -> Condition:
    """Returns the condition of the diffusion prior for b captions.

    Args:
        text: CLIP's encoding of the captions.
        empty: that of b empty captions; a network that learned no null is guided by it.
    """
    condition = text._asdict()
    if network.learned_null or empty is None:
        return condition
    return {**condition, "empty": empty._asdict()}


def decoder_condition(
    network: Decoder,
    z_img: Array,
    text: TextEncoding | None,
    tokens: Array,
    has_caption: Array | None = None,
    empty: TextEncoding | None = None,
) -> Condition:
    """Returns the condition of the decoder for z_img [b, dim] and b captions (unCLIP section 2.1).

    Args:
        text: CLIP's encoding of the captions; None if the decoder has a text encoder of its own.
        tokens: int32 [b, n], what such an encoder reads.
        has_caption: bool [b], False where the caption is to be ignored; None: nowhere.
        empty: see `prior_condition`.
    """
    # Training and guidance clear z_mask where z_img is to be ignored.
    condition: Condition = {"z_img": z_img, "z_mask": jnp.ones(z_img.shape[:1], bool)}
    if network.text is None:
        assert text is not None
        condition["txt_enc"], condition["txt_mask"] = text.txt_enc, text.txt_mask
    else:
        condition["tokens"] = tokens
        # The last id of the vocabulary is the end-of-text token.
        condition["txt_mask"] = text_mask(tokens, network.text["vocab_size"] - 1)
    if network.z_txt_in_time and text is not None:
        condition["z_txt"] = text.z_txt
    if network.learned_null and has_caption is not None:
        condition["txt_mask"] &= has_caption[:, None]
    if not network.learned_null and empty is not None:
        condition["empty"] = empty._asdict()
    return condition


def without_caption(condition: Mapping[str, Any], learned_null: bool) -> Condition:
    """Returns `condition` with every caption replaced by "no caption"."""
    if learned_null:
        return {**condition, "txt_mask": jnp.zeros_like(condition["txt_mask"])}
    assert "empty" in condition, "a network without a learned null needs the empty caption"
    # Only what the network reads: a decoder's condition has z_txt only with `z_txt_in_time`.
    empty = {name: x for name, x in condition["empty"].items() if name in condition}
    return {**condition, **empty}
