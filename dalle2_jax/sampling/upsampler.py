"""Drawing a large picture from a small one (unCLIP section 2.1): no text, no guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import arrays
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Progress, StageSampler
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class UpsamplerSampler(StageSampler):
    """With `separate_last_step` another network of the same shapes takes the last step: the
    parameters are {"first": ..., "last": ...}."""

    image_size: int = 256
    separate_last_step: bool = False

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
        return [(params["first"], steps - 1), (params["last"], 1)][steps == 1 :]

    def null(self, cond: Mapping[str, Array]) -> Mapping[str, Array]:
        return cond

    def __call__(
        self,
        params: Params,
        low_res: Array,
        keys: Array,
        progress: Progress | None = None,
        noise: Array | None = None,
        known: Array | None = None,
    ) -> Array:
        """low_res [b, s, s, 3] in [-1, 1], keys [b] -> [b, image_size, image_size, 3].

        `noise` [1 + steps, b, image_size, image_size, 3] and `known` [b, image_size, image_size,
        4]: see `StageSampler.draw`.
        """
        cond = {"low_res": arrays.resize(low_res, self.image_size, "bicubic")}
        if known is not None:
            cond["known"] = known
        return jnp.clip(self.draw(params, cond, keys, self.shape, noise, progress), -1, 1)
