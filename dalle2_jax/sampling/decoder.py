"""Sampling a small image from z_img and a caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from dalle2_jax.nets.conditioning import without_caption
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Events, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class DecoderSampler(StageSampler):
    """Samples images [b, image_size, image_size, 3]."""

    network: Decoder
    image_size: int = 64
    ENTRY_OPTIONS: ClassVar = {"image_size": None}
    needs_clip: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.image_size, self.image_size, 3)

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Any]) -> Array:
        return forward(self.network, params, x_t, t, cond, False)

    def null(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        null = without_caption(cond, self.network.learned_null)
        # Guidance leaves out z_img and the caption together.
        return {**null, "z_mask": jnp.zeros_like(cond["z_mask"])}

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        noise: Array | None = None,
        known: Array | None = None,
    ) -> Events[Array]:
        """Samples images [b, s, s, 3] in [-1, 1].

        Args:
            cond: see `nets.conditioning.decoder_condition`.
            keys: typed keys [b].
            noise: [1 + steps, b, s, s, 3], see `StageSampler.sample`.
            known: [b, s, s, 4], the known part of the images, see `imaging.masks`.
        """
        if known is not None:
            cond = {**cond, "known": known}
        x_0 = yield from self.sample(params, cond, keys, self.shape, noise)
        # The last step may overshoot a little where the settings do not clip.
        return jnp.clip(x_0, -1, 1)
