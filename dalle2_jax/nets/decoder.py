"""The decoder: GLIDE's text-conditional U-Net that also sees z_img (unCLIP section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from dalle2_jax.nets.layers import LayerNorm, TimestepMLP
from dalle2_jax.nets.transformer import Transformer
from dalle2_jax.nets.unet import UNet, smallest_size
from dalle2_jax.types import Array


class TextEncoder(nn.Module):
    """GLIDE's text transformer: no mask; past the end stand learned embeddings, one a place.

    The empty caption is therefore nothing but these: the learned null of classifier-free
    guidance. (tokens [b, n], mask bool [b, n]) -> [b, n, width].
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    remat: str | bool = "none"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        n = tokens.shape[1]
        shape = (self.context_length, self.width)
        init = nn.initializers.normal(0.02)
        padding = self.param("padding", init, shape, jnp.float32)[None, :n]
        positions = self.param("positions", init, shape, jnp.float32)[None, :n]
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="token")
        x = jnp.where(mask[..., None], embed(tokens) + positions, padding)
        x = Transformer(
            self.depth, self.heads, self.activation, self.dtype, self.remat, name="transformer"
        )(x)
        return LayerNorm(name="norm")(x)


class Decoder(nn.Module):
    """The decoder: x_t [b, h, w, 3], t [b] and a condition -> raw output float32 [b, h, w, 3 or 6].

    A GLIDE U-Net that is also conditioned on z_img (unCLIP section 2.1). z_img enters twice:
    projected and added to the timestep embedding, and projected to `extra_tokens` tokens that
    follow the caption's in the context of every attention layer.

    Attributes:
        unet: arguments of `UNet`.
        dim: width of z_img.
        context_length: tokens of a caption.
        text: arguments of `TextEncoder`; None: captions come encoded (CLIP's hidden states), which
            small models share.
        extra_tokens: tokens that z_img is projected to.
        learned_variance: the output has twice the channels.
        dtype: what the network computes in; norms, softmax and the output are float32.
        learned_null: learned tokens fill the places past a caption's end, and "no caption" is
            nothing but these. Otherwise nobody attends past the end, and no caption is the empty
            one's encoding.
        text_projection: width that CLIP's hidden states are projected to, and normed; None: as they
            are.
        z_txt_in_time: CLIP's z_txt joins the timestep embedding in place of the caption's last
            token.
        unit_length: z_img comes with unit length.
        inpaints: the network is given the known part of the image, cond["known"] [b, h, w, 4]: its
            colours, 0 where they are unknown, and 1 where they are known (GLIDE section 2.3).
    """

    reads_text: ClassVar[bool] = True  # its shapes depend on the width of CLIP's text tower

    unet: Mapping[str, Any]
    dim: int
    context_length: int
    text: Mapping[str, Any] | None = None
    extra_tokens: int = 4
    learned_variance: bool = True
    dtype: Any = jnp.float32
    learned_null: bool = True
    text_projection: int | None = None
    z_txt_in_time: bool = False
    unit_length: bool = True
    inpaints: bool = False
    SECTIONS: ClassVar = {"unet": UNet, "text": TextEncoder}

    def init_inputs(self, text_width: int, size: int | None = None) -> tuple[Any, ...]:
        """Returns zeros to call `init` with, for a CLIP whose text tower has `text_width`.

        Images are of `size` px; None: as small as possible.
        """
        size = size or smallest_size(self.unet)
        cond = {
            "z_img": jnp.zeros((1, self.dim)),
            "z_mask": jnp.ones((1,), bool),
            "txt_mask": jnp.ones((1, self.context_length), bool),
            "txt_enc": jnp.zeros((1, self.context_length, text_width)),
            "z_txt": jnp.zeros((1, self.dim)),
            "tokens": jnp.zeros((1, self.context_length), jnp.int32),
        }
        if self.inpaints:
            cond["known"] = jnp.zeros((1, size, size, 4))
        return jnp.zeros((1, size, size, 3)), jnp.zeros((1,), jnp.int32), cond, False

    @nn.compact
    def __call__(self, x_t: Array, t: Array, cond: Mapping[str, Array], train: bool) -> Array:
        """Predicts from x_t, by the condition.

        Args:
            x_t: [b, h, w, 3].
            t: int32 [b], of the training schedule.
            cond: z_img [b, dim], z_mask bool [b]; txt_mask bool [b, n] with either tokens [b, n] or
                txt_enc [b, n, w]; z_txt [b, dim] if it joins the time. False in z_mask stands for
                the learned null, in txt_mask for what `learned_null` says.
            train: whether dropout is on.
        """
        b, n = cond["txt_mask"].shape
        channels = self.unet["channels"]
        emb = TimestepMLP(channels, 4 * channels, self.dtype, name="time")(t)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        null = self.param("null_z_img", nn.initializers.normal(0.02), (self.dim,), jnp.float32)
        # Unit length puts a coordinate at dim**-0.5: bring it to one, as the layers expect.
        z_img = cond["z_img"] * self.dim**0.5 if self.unit_length else cond["z_img"]
        z_img = jnp.where(cond["z_mask"][:, None], z_img, null[None])  # [b, dim]

        if self.text is None:
            txt_enc = cond["txt_enc"]
            if self.text_projection:
                txt_enc = LayerNorm(name="norm_txt")(dense(self.text_projection, "txt")(txt_enc))
            if self.learned_null:
                shape = (self.context_length, txt_enc.shape[-1])
                padding = self.param("padding", nn.initializers.normal(0.02), shape, jnp.float32)
                txt_enc = jnp.where(cond["txt_mask"][..., None], txt_enc, padding[None, :n])
        else:
            encoder = TextEncoder(**self.text, dtype=self.dtype, name="text")
            txt_enc = encoder(cond["tokens"], cond["txt_mask"])
        width = txt_enc.shape[-1]
        # GLIDE's last token joins the time. Where it is padding it still has read the caption,
        # but not in a causal tower such as CLIP's: there the caption's own last token serves.
        if self.z_txt_in_time:
            last = cond["z_txt"]
        elif self.text is None:
            # Without a caption this is place 0, which holds a learned token by then.
            at = jnp.maximum(cond["txt_mask"].sum(axis=1) - 1, 0)
            last = jnp.take_along_axis(txt_enc, at[:, None, None], axis=1)[:, 0]
        else:
            last = txt_enc[:, -1]
        emb = emb + dense(4 * channels, "emb_txt")(last) + dense(4 * channels, "emb_z_img")(z_img)
        extra = dense(self.extra_tokens * width, "tokens_z_img")(z_img)
        extra = extra.reshape(b, self.extra_tokens, width)
        context = jnp.concatenate([txt_enc.astype(self.dtype), extra], axis=1)  # b n+extra width
        # With a learned null every place holds something to read, so nothing is masked.
        context_mask = None
        if not self.learned_null:
            extra_tokens = ((0, 0), (0, self.extra_tokens))
            context_mask = jnp.pad(cond["txt_mask"], extra_tokens, constant_values=True)

        out_channels = x_t.shape[-1] * (2 if self.learned_variance else 1)
        unet = UNet(out_channels=out_channels, **self.unet, dtype=self.dtype, name="unet")
        # A network that does not inpaint ignores `known`: its sampler puts the pixels in instead.
        known = cond.get("known") if self.inpaints else None
        return unet(x_t.astype(self.dtype), emb, context, train, context_mask, known)
