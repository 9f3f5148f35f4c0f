"""z_txt in place of z_img: the ablation of unCLIP's section 5.1, figure 8."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from dalle2_jax.nets.clip import TextEncoding, normalise
from dalle2_jax.sampling.stage import Progress
from dalle2_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Nothing can be set."""


@dataclasses.dataclass(frozen=True)
class NoPrior:
    """A prior in form only. `length` is that of this CLIP's z_img, to which z_txt is brought."""

    length: float = 1.0
    network: None = None
    settings: NoSettings = NoSettings()
    stage: ClassVar[str] = "no_prior"

    def condition(self, text: TextEncoding, empty: TextEncoding | None = None) -> dict[str, Any]:
        del empty
        return {"z_txt": text.z_txt}

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        progress: Progress | None = None,
        noise: None = None,
    ) -> Array:
        """The `condition` of b captions -> float32 [b, dim]."""
        del params, keys, progress, noise
        return normalise(cond["z_txt"]) * self.length
