"""Drawing a small picture from z_img and a caption (unCLIP section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dalle2_jax.nets.clip import TextEncoding, text_mask
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling.stage import Progress, StageSampler, no_caption
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class DecoderSampler(StageSampler):
    image_size: int = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.image_size, self.image_size, 3)

    def condition(
        self,
        z_img: Array,
        text: TextEncoding | None,
        tokens: Array,
        given: Array | None = None,
        empty: TextEncoding | None = None,
    ) -> dict[str, Any]:
        """What the network is told of z_img [b, dim] and b captions.

        These are CLIP's encoding or, for a text encoder of the network's own, tokens [b, n].
        `given` [b] is False where there is no caption but the empty one, and `empty` the encoding
        of b empty ones, which guides a network that learned no null.
        """
        network = self.network
        cond = {"z_img": z_img, "z_mask": jnp.ones(z_img.shape[:1], bool)}
        if network.text is None:
            assert text is not None
            cond |= {"txt_enc": text.txt_enc, "txt_mask": text.txt_mask}
        else:
            cond |= {
                "tokens": tokens,
                "txt_mask": text_mask(tokens, network.text["vocab_size"] - 1),
            }
        if network.z_txt_in_time and text is not None:
            cond |= {"z_txt": text.z_txt}
        if network.learned_null and given is not None:
            cond["txt_mask"] &= given[:, None]
        if network.learned_null or empty is None:
            return cond
        return cond | {"empty": empty._asdict()}

    def apply(self, params: Params, x_t: Array, t: Array, cond: Mapping[str, Any]) -> Array:
        return forward(self.network, params, x_t, t, cond, False)

    def null(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        caption = no_caption(cond, self.network.learned_null)
        return {**cond, **caption, "z_mask": jnp.zeros_like(cond["z_mask"])}

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        progress: Progress | None = None,
        noise: Array | None = None,
        known: Array | None = None,
    ) -> Array:
        """`cond` as `nets.decoder.Decoder` takes it, keys [b] -> images [b, s, s, 3] in [-1, 1].

        `condition` makes one. `noise` [1 + steps, b, s, s, 3] and `known` [b, s, s, 4]: see
        `StageSampler.draw`.
        """
        if known is not None:
            cond = {**cond, "known": known}
        return jnp.clip(self.draw(params, cond, keys, self.shape, noise, progress), -1, 1)
