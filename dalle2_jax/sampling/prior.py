"""Drawing z_img from a caption (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle2_jax.nets.clip import TextEncoding, normalise
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Progress, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class PriorSampler(StageSampler):
    """Two z_img are drawn and the one with the larger dot product with z_txt is kept."""

    candidates: int = 2

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
        args = (cond["z_txt"], cond["txt_enc"], cond["txt_mask"])
        return forward(self.network, params, x_t, t, *args)

    def null(self, cond: Mapping[str, Array]) -> Mapping[str, Array]:
        return {**cond, "txt_mask": jnp.zeros_like(cond["txt_mask"])}

    def __call__(
        self, params: Params, text: TextEncoding, keys: Array, progress: Progress | None = None
    ) -> Array:
        """CLIP's encoding of b captions and typed keys [b] -> z_img float32 [b, dim], unit length.

        Both candidates of a caption stand in one batch of b * candidates rows.
        """
        b, k = keys.shape[0], self.candidates
        keys = jax.vmap(lambda key: jax.random.split(key, k))(keys).reshape(b * k)
        cond = {name: jnp.repeat(a, k, axis=0) for name, a in text._asdict().items()}
        z = self.draw(params, cond, keys, (text.z_txt.shape[-1],), progress=progress)
        z = normalise(z).reshape(b, k, -1)
        nearness = jnp.einsum("bkd,bd->bk", z, text.z_txt)
        best = jnp.argmax(nearness, axis=1)
        return jnp.take_along_axis(z, best[:, None, None], axis=1)[:, 0]
