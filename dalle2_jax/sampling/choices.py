"""A model's samplers with other settings than its folder's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax import arguments
from dalle2_jax.errors import UserError
from dalle2_jax.options import near_miss

Choice = Any
"""One value for the stage(s) a setting means by default, or {stage: value}."""


def chosen(samplers: Mapping[str, Any], choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The samplers by stage, with those of `choices` (field of their settings -> `Choice`) that are
    not None. One value is the decoder's, of `solver` every stage's that has one.

    Raises:
        UserError: an unknown stage, or what the settings do not take.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in samplers}
    for field, choice in choices.items():
        if choice is None:
            continue
        known = [name for name, s in samplers.items() if hasattr(s.settings, field)]
        if not isinstance(choice, Mapping):
            choice = dict.fromkeys(known if field == "solver" else ["decoder"], choice)
        for stage, value in choice.items():
            if stage not in known:
                raise UserError(f"{field}: no stage {stage!r}{near_miss(str(stage), known)}")
            changes[stage][field] = arguments.plain(value)
    return {
        name: dataclasses.replace(
            sampler, settings=dataclasses.replace(sampler.settings, **changes[name])
        )
        for name, sampler in samplers.items()
    }
