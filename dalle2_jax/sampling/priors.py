"""Which prior draws z_img, or none: z_txt in its place (the ablation of unCLIP's figure 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from dalle2_jax.errors import UserError, near_miss
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


NAMES = {"diffusion": "prior", "ar": "ar_prior", "none": NoPrior.stage}  # a user's -> the stage


def choose(name: str | None, model: Any) -> Any:
    """The sampler of z_img that a user calls `name`, of a `cascade.Cascade`; None: its own.

    UserError: there is no such prior, in one line that says which there are.
    """
    if name is None:
        return model.prior
    if not isinstance(name, str) or name not in NAMES:
        raise UserError(f"prior is {name!r}{near_miss(str(name), NAMES)}")
    stage = NAMES[name]
    if model.prior is not None and model.prior.stage == stage:
        return model.prior  # with what was set of it
    if stage == NoPrior.stage:
        unit = model.clip.unit_length
        return NoPrior(1.0 if unit else _length(model.params.get("prior", {})))
    if stage not in model.priors:
        there = [repr(k) for k, v in NAMES.items() if v in model.priors or v == NoPrior.stage]
        raise UserError(f"prior={name!r}: {model.weights} has {' and '.join(there)} alone")
    return model.priors[stage]


def _length(diffusion: Params) -> float:
    """Root mean square length of z_img, as a standardised diffusion prior knows it."""
    if "std" not in diffusion:
        raise UserError("prior='none': of this model's z_img the length is not known")
    return float(jnp.sqrt(jnp.sum(diffusion["mean"] ** 2 + diffusion["std"] ** 2)))
