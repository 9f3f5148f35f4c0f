"""The choice of a prior, or of none: z_txt in place of z_img (the ablation of unCLIP, figure 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import normalise
from dalle2_jax.sampling.stage import Events
from dalle2_jax.types import Array, Params
from dalle2_jax.validation import checks


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """No settings."""


@dataclasses.dataclass(frozen=True)
class NoPrior:
    """Passes z_txt on as z_img, scaled to `length`, the length of this CLIP's z_img."""

    length: float = 1.0
    network: None = None
    settings: NoSettings = NoSettings()
    stage: ClassVar[str] = "no_prior"

    def __call__(
        self,
        params: Params,
        cond: Mapping[str, Any],
        keys: Array,
        noise: None = None,
        known: None = None,
    ) -> Events[Array]:
        """Returns z_txt in place of z_img, float32 [b, dim]."""
        del params, keys, noise, known
        # Nothing to report, but without a yield this would be no generator.
        yield from ()
        return normalise(cond["z_txt"]) * self.length


NAMES = {
    "diffusion": "prior",
    "ar": "ar_prior",
    "none": NoPrior.stage,
}  # a user's word -> the stage


def choose(name: str | None, model: Any) -> Any:
    """Returns the sampler of z_img that a user calls `name`, of a `Cascade`; None: its present one.

    Raises UserError if the model has no such prior.
    """
    if name is None:
        return model.prior
    stage = NAMES[checks.one_of("prior", name, NAMES)]
    if model.prior is not None and model.prior.stage == stage:
        return model.prior  # with the options it has
    if stage == NoPrior.stage:
        # The decoder expects z_img as long as in training; z_txt may have quite another length.
        unit = model.clip.unit_length
        return NoPrior(1.0 if unit else _length(model.params.get("prior", {})))
    if stage not in model.priors:
        names = [repr(k) for k, v in NAMES.items() if v in model.priors or v == NoPrior.stage]
        raise UserError(f"prior={name!r}: {model.weights} has only {' and '.join(names)}")
    return model.priors[stage]


def _length(diffusion: Params) -> float:
    """Returns the root mean square length of z_img, from the statistics of a standardised prior."""
    if "std" not in diffusion:
        raise UserError("prior='none': the length of this model's z_img is not known")
    # E |z|^2 = |E z|^2 + the sum of the variances.
    return float(jnp.sqrt(jnp.sum(diffusion["mean"] ** 2 + diffusion["std"] ** 2)))
