"""Sampling options that a user sets in place of what a model folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.validation import checks

Override = Any
"""One value, or {stage: value}; None keeps what the folder says."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling the stages, where they differ from the model folder.

    Each option is None (as the folder says), {stage: value}, or one value: of `solver` that is
    every stage's, of all others the decoder's. Their meaning is documented in
    `sampling.settings.Settings` and, for the autoregressive prior, in `sampling.ar_prior.Settings`.
    """

    steps: Override = None
    cfg_scale: Override = None
    solver: Override = None
    eta: Override = None
    cfg_interval: Override = None
    cfg_rescale: Override = None
    variance: Override = None

    def apply(self, samplers: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the samplers, by stage, with these options.

        Raises UserError for a stage that does not exist or has no such option, and for values out
        of range.
        """
        changes: dict[str, dict[str, Any]] = {stage: {} for stage in samplers}
        for field in dataclasses.fields(self):
            for stage, value in self._by_stage(field.name, samplers).items():
                # numpy scalars and lists become numbers and tuples: settings must be hashable.
                changes[stage][field.name] = checks.to_python_values(value)
        # `replace` runs the checks of both again, with all changes at once: options that only fit
        # together are not refused one by one.
        return {
            stage: dataclasses.replace(
                sampler, settings=dataclasses.replace(sampler.settings, **changes[stage])
            )
            for stage, sampler in samplers.items()
        }

    def _by_stage(self, option: str, samplers: Mapping[str, Any]) -> Mapping[str, Any]:
        value = getattr(self, option)
        if value is None:
            return {}
        stages = [name for name, s in samplers.items() if hasattr(s.settings, option)]
        if not isinstance(value, Mapping):
            # Steps or guidance that suit the decoder do not suit the others (an upsampler refuses
            # guidance). A solver may serve all stages.
            return dict.fromkeys(stages if option == "solver" else ["decoder"], value)
        for stage in value:
            if stage not in samplers:
                raise UserError(f"{option}: no stage {stage!r}{near_miss(str(stage), stages)}")
            if stage not in stages:
                raise UserError(f"{option} is no setting of {stage}, but of {', '.join(stages)}")
        return value
