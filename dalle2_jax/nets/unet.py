"""The ADM U-Net (2105.05233) with GLIDE's text attention (2112.10741, section 2.1).

    conv_in -> [blocks, halve] a level -> middle -> [blocks, double] a level -> conv_out

Every output of the way down is kept and concatenated to the input of a block on the way up, last
first. The embedding (time, and what joins it) enters every residual block; the context (text
tokens) is attended to at some levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dalle2_jax.nets.attention import attention, merge_heads, split_heads
from dalle2_jax.nets.layers import Conv3x3, GroupNorm
from dalle2_jax.nets.remat import rematerialised
from dalle2_jax.parallel.shards import keep_rows_whole
from dalle2_jax.types import Array


def halve(x: Array) -> Array:
    """Averages 2 x 2 pixels: [b, h, w, c] -> [b, h/2, w/2, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def double(x: Array) -> Array:
    """Repeats each pixel: [b, h, w, c] -> [b, 2h, 2w, c]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def fold(x: Array, p: int) -> Array:
    """Moves patches into channels: [b, h, w, c] -> [b, h/p, w/p, p p c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // p, w // p, p * p * c)


def unfold(x: Array, p: int) -> Array:
    """Moves channels into patches, the inverse of `fold`: [b, h, w, p p c] -> [b, p h, p w, c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // p**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, c // p**2)


KNOWN = "conv_known"
"""The layer of a UNet that reads its `known` channels."""

RESAMPLE = {"": lambda x: x, "down": halve, "up": double}


class ResBlock(nn.Module):
    """BigGAN's residual block; the embedding scales and shifts its second norm.

    `resample` ("", "down", "up") acts between the first activation and the first convolution, and
    on the skip path.
    """

    features: int
    resample: str = ""
    dropout: float = 0.0
    scale_shift: bool = True
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        resample = RESAMPLE[self.resample]
        # Resampling comes before conv1: a halving block convolves a quarter of the pixels.
        h = resample(nn.silu(GroupNorm(self.groups, name="norm1")(x)))
        h = Conv3x3(self.features, dtype=self.dtype, name="conv1")(h)
        out = self.features * (2 if self.scale_shift else 1)
        # [b, e] -> [b, 1, 1, out], to broadcast over pixels.
        emb = nn.Dense(out, dtype=self.dtype, name="emb")(nn.silu(emb))[:, None, None]
        norm2 = GroupNorm(self.groups, name="norm2")
        if self.scale_shift:
            # A "tensor" axis of the mesh may have split the channels that are cut in two here.
            scale, shift = jnp.split(keep_rows_whole(emb), 2, axis=-1)
            # 1 + scale: where the embedding says nothing (0), the norm's output passes unchanged.
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        # conv2 is zero at first: a fresh block passes on its skip path alone, however deep the net.
        h = Conv3x3(self.features, zero=True, dtype=self.dtype, name="conv2")(h)
        x = resample(x)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="skip")(x)  # a 1x1 convolution
        return x + h


class AttentionBlock(nn.Module):
    """Attention of every pixel to the context's tokens and to all pixels, in one softmax (GLIDE).

    `context_mask` is False at tokens that are not attended to.
    """

    head_channels: int = 64
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None, context_mask: Array | None = None) -> Array:
        b, h, w, c = x.shape
        heads = max(1, c // self.head_channels)  # a level narrower than one head gets one
        y = GroupNorm(self.groups, name="norm")(x).reshape(b, h * w, c)

        def project(tokens: Array, names: Sequence[str]) -> list[Array]:
            return [
                split_heads(nn.Dense(c, dtype=self.dtype, name=name)(tokens), heads)
                for name in names
            ]

        q, k, v = project(y, ["q", "k", "v"])
        # Tokens have keys and values of their own, but share the softmax with the pixels: one query
        # weighs text against image.
        if context is not None:
            context_k, context_v = project(context, ["context_k", "context_v"])
            k = jnp.concatenate([context_k, k], axis=1)  # [b, n + h w, heads, d]
            v = jnp.concatenate([context_v, v], axis=1)
        mask = None
        if context_mask is not None:
            # [b, 1, 1, n + h w]. Pixels are never masked, so every query has a key, which the flash
            # kernel requires.
            mask = jnp.pad(context_mask, ((0, 0), (0, h * w)), constant_values=True)[:, None, None]
        out = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")
        return x + out(merge_heads(attention(q, k, v, mask))).reshape(b, h, w, c)


def smallest_size(unet: Mapping[str, Any]) -> int:
    """Returns the smallest side in pixels that `UNet(**unet)` takes; others are its multiples."""
    return unet.get("patch_size", 1) * 2 ** (len(unet["channel_mults"]) - 1)


class UNet(nn.Module):
    """x [b, h, w, c], emb [b, e], context [b, n, d] or None -> float32 [b, h, w, out_channels].

    Attributes:
        out_channels: of the output.
        channels: level i has channels * channel_mults[i] channels at h / 2**i pixels.
        channel_mults: one factor a level.
        num_blocks: residual blocks a level.
        attention_levels: levels with attention after each block; if any, the middle has it too.
        head_channels: channels of an attention head.
        dropout: of the residual blocks.
        scale_shift: the embedding scales and shifts (ADM); otherwise it is added.
        groups: of the group norms.
        patch_size: p x p pixels are folded into channels at the entrance and unfolded at the exit,
            which trades detail for speed (a small model's way to wide channels at few pixels, where
            convolutions are fastest).
        remat: policy of `nets.remat` for the blocks.
        dtype: what the blocks compute in.
    """

    out_channels: int
    channels: int
    channel_mults: Sequence[int]
    num_blocks: int
    attention_levels: Sequence[int] = ()
    head_channels: int = 64
    dropout: float = 0.0
    scale_shift: bool = True
    groups: int = 32
    patch_size: int = 1
    remat: str | bool = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        emb: Array,
        context: Array | None = None,
        train: bool = False,
        context_mask: Array | None = None,
        known: Array | None = None,
    ) -> Array:
        # Argument 3 of ResBlock, counting self, is `train`: a Python bool, not an array.
        block_class = rematerialised(ResBlock, self.remat, static_argnums=(3,))
        attention_class = rematerialised(AttentionBlock, self.remat)

        def block(x: Array, level: int, name: str, resample: str = "") -> Array:
            features = self.channels * self.channel_mults[level]
            return block_class(
                features,
                resample,
                self.dropout,
                self.scale_shift,
                self.groups,
                self.dtype,
                name=name,
            )(x, emb, train)

        def attend(x: Array, name: str) -> Array:
            return attention_class(self.head_channels, self.groups, self.dtype, name=name)(
                x, context, context_mask
            )

        levels = len(self.channel_mults)
        p = self.patch_size
        # Every level but the last halves the folded image.
        factor = p * 2 ** (levels - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {x.shape[1:3]}")
        x = Conv3x3(self.channels, dtype=self.dtype, name="conv_in")(fold(x, p))
        if known is not None:
            # A convolution of its own, rather than more input channels of conv_in. Weights trained
            # without `known` then load unchanged, and since this one starts at zero, the network
            # computes what it did before. conv_in has the bias already.
            conv = Conv3x3(self.channels, zero=True, dtype=self.dtype, use_bias=False, name=KNOWN)
            x += conv(fold(known.astype(self.dtype), p))
        # Skips: conv_in's output, one a block and one a halving. That is levels * (num_blocks + 1),
        # exactly as many as the way up takes: hence its one block more a level.
        skips = [x]
        for level in range(levels):
            for i in range(self.num_blocks):
                x = block(x, level, f"down{level}_block{i}")
                if level in self.attention_levels:
                    x = attend(x, f"down{level}_attention{i}")
                skips.append(x)
            if level < levels - 1:
                x = block(x, level, f"down{level}_halve", "down")
                skips.append(x)

        x = block(x, levels - 1, "middle_block0")
        if self.attention_levels:
            x = attend(x, "middle_attention")
        x = block(x, levels - 1, "middle_block1")

        for level in reversed(range(levels)):
            for i in range(self.num_blocks + 1):
                # Last in, first out: sizes match, since the way up mirrors the way down.
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, level, f"up{level}_block{i}")
                if level in self.attention_levels:
                    x = attend(x, f"up{level}_attention{i}")
            if level > 0:
                x = block(x, level, f"up{level}_double", "up")

        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        out_channels = self.out_channels * p**2
        # conv_out is zero at first: a fresh network predicts 0 everywhere.
        x = Conv3x3(out_channels, zero=True, dtype=self.dtype, name="conv_out")(x)
        return unfold(x, p).astype(jnp.float32)  # losses and solvers compute in float32
