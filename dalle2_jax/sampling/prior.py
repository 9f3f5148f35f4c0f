"""Drawing z_img from a caption (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.nets.clip import TextEncoding, normalise
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Progress, StageSampler, no_caption
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class PriorSampler(StageSampler):
    """Several z_img are drawn and the one with the largest dot product with z_txt is kept."""

    candidates: int = 2
    unit_length: bool = True  # of z_img, as its CLIP has it
    stage: ClassVar[str] = "prior"

    def condition(self, text: TextEncoding, empty: TextEncoding | None = None) -> dict[str, Any]:
        """What the network is told of b captions; `empty`, the encoding of b empty ones, guides a
        network that learned no null."""
        cond: dict[str, Any] = text._asdict()
        if self.network.learned_null or empty is None:
            return cond
        return cond | {"empty": empty._asdict()}

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Any]) -> Array:
        args = (cond["z_txt"], cond["txt_enc"], cond["txt_mask"])
        return forward(self.network, params, x_t, t, *args)

    def null(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**cond, **no_caption(cond, self.network.learned_null)}

    @property
    def rows(self) -> int:
        return self.candidates

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.network.dim,)

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        progress: Progress | None = None,
        noise: Array | None = None,
    ) -> Array:
        """The `condition` of b captions, typed keys [b] -> z_img float32 [b, dim].

        All candidates of a caption stand in one batch of b * candidates rows. `noise`
        [1 + steps, b * candidates, dim]: see `StageSampler.draw`.
        """
        b, k = keys.shape[0], self.candidates
        keys = jax.vmap(lambda key: jax.random.split(key, k))(keys).reshape(b * k)
        each = jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cond)
        x_0 = self.draw(params, each, keys, self.shape, noise, progress)
        z = forward(self.network, params, x_0, method="to_z_img")
        return nearest_to(cond["z_txt"], z, self.unit_length)


def nearest_to(z_txt: Array, z: Array, unit_length: bool) -> Array:
    """Of k z_img [b * k, dim] of each caption the one with the largest dot product with its z_txt
    [b, dim]; of unit length where so asked."""
    z = normalise(z) if unit_length else z
    each = z.reshape(len(z_txt), -1, z.shape[-1])  # b k dim
    best = jnp.argmax(jnp.einsum("bkd,bd->bk", normalise(each), z_txt), axis=1)
    return jnp.take_along_axis(each, best[:, None, None], axis=1)[:, 0]
