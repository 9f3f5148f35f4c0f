"""Stages sampled otherwise than their folder says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.validation import arguments

Choice = Any
"""One value for the stage(s) a setting means by default, or {stage: value}."""

_ALL = "solver"  # one value of it is every stage's; of the others it is the decoder's


def chosen(samplers: Mapping[str, Any], choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The samplers, by stage, with {field of their settings: choice}; None is no choice.

    UserError for a stage that is not there or has no such setting, and for a value that is none.
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in samplers}
    for field, choice in choices.items():
        if choice is None:
            continue
        known = [name for name, s in samplers.items() if hasattr(s.settings, field)]
        if not isinstance(choice, Mapping):
            choice = dict.fromkeys(known if field == _ALL else ["decoder"], choice)
        for stage, value in choice.items():
            if stage not in samplers:
                raise UserError(f"{field}: no stage {stage!r}{near_miss(str(stage), known)}")
            if stage not in known:
                raise UserError(f"{field} is no setting of {stage}, but of {', '.join(known)}")
            settings[stage][field] = arguments.plain(value)
    return {
        name: dataclasses.replace(
            sampler, settings=dataclasses.replace(sampler.settings, **settings[name])
        )
        for name, sampler in samplers.items()
    }
