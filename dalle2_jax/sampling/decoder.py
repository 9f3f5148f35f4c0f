"""Drawing a small picture from z_img and a caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Progress, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class DecoderSampler(StageSampler):
    image_size: int = 64

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
        return forward(self.network, params, x_t, t, cond, False)

    def null(self, cond: Mapping[str, Array]) -> Mapping[str, Array]:
        masks = {name: jnp.zeros_like(cond[name]) for name in ("z_mask", "txt_mask")}
        return {**cond, **masks}

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Array],
        keys: Array,
        progress: Progress | None = None,
    ) -> Array:
        """`cond` as `nets.decoder.Decoder` takes it, keys [b] -> images [b, s, s, 3] in [-1, 1]."""
        shape = (self.image_size, self.image_size, 3)
        return jnp.clip(self.draw(params, cond, keys, shape, progress=progress), -1, 1)
