"""Sampling z_img from a caption by the diffusion prior (unCLIP section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.nets.clip import normalise
from dalle2_jax.nets.conditioning import without_caption
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.sampling.stage import Events, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class PriorSampler(StageSampler):
    """Samples several z_img and keeps the one with the largest dot product with z_txt."""

    network: DiffusionPrior
    candidates: int = 2
    unit_length: bool = True  # whether this CLIP's z_img have unit length
    stage: ClassVar[str] = "prior"
    ENTRY_OPTIONS: ClassVar = {"candidates": 2}
    needs_clip: ClassVar[bool] = True

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Any]) -> Array:
        text = (cond["z_txt"], cond["txt_enc"], cond["txt_mask"])
        return forward(self.network, params, x_t, t, *text)

    def null(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        return without_caption(cond, self.network.learned_null)

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
        noise: Array | None = None,
        known: None = None,
    ) -> Events[Array]:
        """Samples z_img float32 [b, dim].

        All candidates of a caption are rows of one batch, b * candidates in all.

        Args:
            cond: see `nets.conditioning.prior_condition`.
            keys: typed keys [b].
            noise: [1 + steps, b * candidates, dim], see `StageSampler.sample`.
            known: unused: a prior samples no pixels.
        """
        del known
        b, k = keys.shape[0], self.candidates
        # Candidate j of a caption depends on the caption's key and j, not on its batch.
        keys = jax.vmap(lambda key: jax.random.split(key, k))(keys).reshape(b * k)
        cond_rows = jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cond)
        x_0 = yield from self.sample(params, cond_rows, keys, self.shape, noise)
        z = forward(self.network, params, x_0, method="to_z_img")
        return nearest_to(cond["z_txt"], z, self.unit_length)


def nearest_to(z_txt: Array, z: Array, unit_length: bool) -> Array:
    """Returns for each caption the candidate z_img [b, dim] nearest to its text.

    Args:
        z_txt: [b, dim].
        z: [b * k, dim], k candidates a caption.
        unit_length: whether the result is scaled to unit length.
    """
    z = normalise(z) if unit_length else z
    candidates = z.reshape(len(z_txt), -1, z.shape[-1])  # b k dim
    # Candidates are compared by direction, even where the result keeps its length. The length of
    # z_txt is the same for all candidates of a row.
    best = jnp.argmax(jnp.einsum("bkd,bd->bk", normalise(candidates), z_txt), axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]
