"""The upsampler: an ADM U-Net that sees the low-resolution image (unCLIP section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from dalle2_jax.nets.layers import TimestepMLP
from dalle2_jax.nets.unet import UNet, smallest_size
from dalle2_jax.types import Array


class Upsampler(nn.Module):
    """x_t [b, h, w, 3], t [b], low_res [b, h, w, 3] (already resized) -> [b, h, w, 3 or 6].

    Attributes:
        unet: arguments of `UNet`.
        learned_variance: the output has twice the channels.
        residual: the U-Net predicts what `low_res` lacks of x_0 (SRDiff, 2104.14951): a network
            that is narrower than its patches has no room to carry the image through.
        dtype: what the network computes in.
        inpaints: it is given the `known` part [b, h, w, 4] of the image, see
            `nets.decoder.Decoder`.
    """

    unet: Mapping[str, Any]
    learned_variance: bool = False
    residual: bool = False
    dtype: Any = jnp.float32
    inpaints: bool = False
    SECTIONS: ClassVar = {"unet": UNet}

    def init_inputs(self, size: int | None = None) -> tuple[Any, ...]:
        """Returns zeros to call `init` with: images of `size` px, or as small as possible."""
        size = size or smallest_size(self.unet)
        x_t = jnp.zeros((1, size, size, 3))
        known = jnp.zeros((1, size, size, 4)) if self.inpaints else None
        return x_t, jnp.zeros((1,), jnp.int32), x_t, False, known

    @nn.compact
    def __call__(
        self,
        x_t: Array,
        t: Array,
        low_res: Array,
        train: bool = False,
        known: Array | None = None,
    ) -> Array:
        channels = self.unet["channels"]
        emb = TimestepMLP(channels, 4 * channels, self.dtype, name="time")(t)
        out_channels = x_t.shape[-1] * (2 if self.learned_variance else 1)
        unet = UNet(out_channels=out_channels, **self.unet, dtype=self.dtype, name="unet")
        x = jnp.concatenate([x_t, low_res], axis=-1).astype(self.dtype)  # b h w 6
        # No context: the upsampler reads no text.
        out = unet(x, emb, None, train, known=known if self.inpaints else None)
        if self.residual:
            # A learned variance, in the channels after these, has nothing to be added to.
            out = out.at[..., : low_res.shape[-1]].add(low_res)
        return out
