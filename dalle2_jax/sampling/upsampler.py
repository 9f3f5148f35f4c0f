"""Sampling a large image from a small one (unCLIP section 2.1): no text, no guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Events, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class UpsamplerSampler(StageSampler):
    """Samples images [b, image_size, image_size, 3].

    With `separate_last_step` another network of the same shapes takes the last step: the parameters
    are {"first": ..., "last": ...}, as in Karlo.
    """

    image_size: int = 256
    separate_last_step: bool = False
    ENTRY_OPTIONS: ClassVar = {"image_size": None, "separate_last_step": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.cfg_scale != 1:
            raise UserError("an upsampler has nothing to be guided by: its cfg_scale must be 1")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.image_size, self.image_size, 3)

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
        return forward(self.network, params, x_t, t, cond["low_res"], False, cond.get("known"))

    def parts(self, params: Params) -> list[tuple[Params, int]]:
        if not self.separate_last_step:
            return super().parts(params)
        steps = self.settings.num_calls
        if steps == 1:
            return [(params["last"], 1)]
        return [(params["first"], steps - 1), (params["last"], 1)]

    def null(self, cond: Mapping[str, Array]) -> Mapping[str, Array]:
        # Never read: cfg_scale is 1, and then guidance runs the conditional half alone.
        return cond

    def __call__(
        self,
        params: Params,
        low_res: Array,
        keys: Array,
        noise: Array | None = None,
        known: Array | None = None,
    ) -> Events[Array]:
        """Samples images [b, S, S, 3] in [-1, 1], S = image_size.

        Args:
            low_res: [b, s, s, 3] in [-1, 1].
            keys: typed keys [b].
            noise: [1 + steps, b, S, S, 3], see `StageSampler.sample`.
            known: [b, S, S, 4], the known part of the images, see `imaging.masks`.
        """
        # The filter of training (`tasks.upsampler`); another would show in the result.
        cond = {"low_res": arrays.resize(low_res, self.image_size, "bicubic")}
        if known is not None:
            cond["known"] = known
        x_0 = yield from self.sample(params, cond, keys, self.shape, noise)
        return jnp.clip(x_0, -1, 1)
