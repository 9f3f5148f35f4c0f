"""The solvers: how x_t becomes x_{t-1}. Each is a `dalle2_jax.types.Solver` over one schedule.

single      without memory: DDPM, DDIM, Heun
multistep   by past predictions: DPM-Solver++ (2M, 3M, SDE), UniPC
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dalle2_jax.diffusion.schedules import Schedule
from dalle2_jax.diffusion.solvers.multistep import (
    DPMSolverPP2M,
    DPMSolverPP3M,
    DPMSolverPPSDE,
    UniPC,
)
from dalle2_jax.diffusion.solvers.single import DDIM, DDPM, Heun, OverSchedule
from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.types import Solver

__all__ = [
    "DDIM",
    "DDPM",
    "NAMES",
    "DPMSolverPP2M",
    "DPMSolverPP3M",
    "DPMSolverPPSDE",
    "Heun",
    "Solver",
    "UniPC",
    "check_name",
    "make_solver",
    "spacing_for",
]

_SOLVERS: dict[str, type[OverSchedule]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm++": DPMSolverPP2M,
    "dpm++3m": DPMSolverPP3M,
    "dpm++sde": DPMSolverPPSDE,
    "unipc": UniPC,
    "heun": Heun,
}
NAMES = tuple(_SOLVERS)


def check_name(name: str) -> None:
    """Raises UserError for an unknown solver, naming the near miss."""
    if not isinstance(name, str) or name not in _SOLVERS:
        raise UserError(f"unknown sampler {name!r}{near_miss(str(name).lower(), NAMES)}")


def spacing_for(name: str) -> str:
    """The spacing (see `schedules.respace`) that suits the solver of that name."""
    check_name(name)
    return _SOLVERS[name].spacing


def make_solver(name: str, schedule: Schedule, **options: Any) -> Solver:
    """The solver of that name: "ddpm" (variance=), "ddim" (eta=), or one of `NAMES`.

    Raises:
        UserError: an unknown name (the message names the near miss) or option.
    """
    check_name(name)
    # A solver's fields are its options: the dataclass is their only list.
    option_names = [f.name for f in dataclasses.fields(_SOLVERS[name]) if f.name != "schedule"]
    for option in options:
        if option not in option_names:
            raise UserError(
                f"sampler {name!r} has no option {option!r}: "
                f"it takes {', '.join(option_names) or 'no options'}"
            )
    return _SOLVERS[name](schedule, **options)
