"""Settings of sampling a diffusion stage, as its entry in a model folder's config.json has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dalle2_jax.diffusion import guidance, inpainting, schedules
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.solvers import check_name, make_solver, spacing_for
from dalle2_jax.errors import UserError
from dalle2_jax.types import Solver
from dalle2_jax.validation import checks
from dalle2_jax.validation.checks import is_number, is_whole_number


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of a stage; UserError for values out of range or that exclude each other.

    Attributes:
        steps: number of sampling steps; several numbers are the steps in each equal part of time,
            from the cleanest to the noisiest.
        solver: one of `diffusion.solvers.NAMES`.
        cfg_scale: guidance scale w of uncond + w (cond - uncond); 1 is off.
        clip: of the predicted x_0: None, ("static", bound) or ("dynamic", percentile).
        spacing: which steps of the training schedule are kept, see `schedules.respace`; "" takes
            what suits the solver.
        eta: of DDIM: 0 adds no noise, 1 is DDPM.
        variance: of DDPM's noise if none was learned: "small", "large" or "analytic", the last from
            `StageSampler.x_0_error`. With "analytic" DDIM too adds noise of that variance.
        cfg_interval: (low, high) of sigma / alpha within which guidance acts; None: everywhere.
        cfg_rescale: 0 to 1, how far guidance keeps the contrast, see `guidance.guided`.
        repeats: how often each step is taken when part of an image is known (RePaint), see
            `inpainting.Resampling`.
    """

    steps: int | tuple[int, ...] = 50
    solver: str = "ddim"
    cfg_scale: float = 1.0
    clip: tuple[str, float] | None = ("static", 1.0)
    spacing: str = ""
    eta: float = 0.0
    variance: str = "small"
    cfg_interval: tuple[float, float] | None = None
    cfg_rescale: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        check_name(self.solver)
        for name, (is_valid, requirement) in CHECKS.items():
            value = getattr(self, name)
            checks.require(is_valid(value), name, requirement, value)
        # Several numbers are counts in sections; every other spacing spreads one number.
        if isinstance(self.steps, tuple) and self.spacing not in ("", "sections"):
            raise UserError(
                f"spacing={self.spacing!r} takes one number of steps, not {self.steps!r}"
            )
        if self.repeats > 1:
            self._check_repeats()

    def _check_repeats(self) -> None:
        repainting = (
            f"repeats={self.repeats} (RePaint's resampling, for a decoder that was not trained to "
            "inpaint)"
        )
        # Resampling uses a step's noise for the way back, so the step must need none. A solver
        # that remembers would mix predictions from before and after the way back.
        if (self.solver, self.eta) != ("ddim", 0):
            raise UserError(
                f"{repainting} goes with ddim at eta=0, not {self.solver} at eta={self.eta:g}"
            )
        if self.variance == "analytic":  # a step and the way back would share one noise
            raise UserError(f'{repainting} does not go with variance="analytic"')

    @property
    def num_steps(self) -> int:
        return sum(self.steps) if isinstance(self.steps, tuple) else self.steps

    @property
    def num_calls(self) -> int:
        """Number of solver steps, repeated ones included."""
        return inpainting.num_calls(self.num_steps, self.repeats)

    def schedule(self, process: Process) -> schedules.Schedule:
        """Returns the sampled part of the process's schedule."""
        spacing = self.spacing or ("sections" if isinstance(self.steps, tuple) else "")
        return schedules.respace(
            process.training_schedule(), self.steps, spacing or spacing_for(self.solver)
        )

    def guided_at(self, process: Process) -> np.ndarray | None:
        """Returns where guidance acts, bool [num_timesteps]; None: everywhere."""
        if self.cfg_interval is None:
            return None
        # Over the training schedule, since guidance sees the network's t.
        return guidance.within(process.training_schedule(), self.cfg_interval)

    def make_solver(
        self, schedule: schedules.Schedule, variances: np.ndarray | None = None
    ) -> Solver:
        """Returns the solver over `schedule`; `variances` [T] are the analytic ones, if used."""
        # The other solvers have no options: `eta` and `variance` do not reach them.
        options: dict[str, Any] = {
            "ddim": {"eta": self.eta, "variance": variances},
            "ddpm": {"variance": self.variance if variances is None else variances},
        }
        solver = make_solver(self.solver, schedule, **options.get(self.solver, {}))
        if self.repeats == 1:
            return solver
        return inpainting.Resampling(solver, schedule, self.repeats)


def _are_counts(value: Any) -> bool:
    counts = value if isinstance(value, tuple) else (value,)
    return bool(counts) and all(is_whole_number(n, 1) for n in counts)


def _is_clip(value: Any) -> bool:
    match value:
        case None:
            return True
        # The rule's name and its own bounds are checked by `guidance.threshold`.
        case (str(), bound):
            return is_number(bound, 0) and bound > 0
    return False


def _is_interval(value: Any) -> bool:
    match value:
        case None:
            return True
        case (low, high):
            return is_number(low, 0) and is_number(high) and low < high
    return False


# field -> (check, what it requires)
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_are_counts, "whole numbers from 1"),
    "clip": (_is_clip, 'null, ["static", bound] or ["dynamic", percentile]'),
    "cfg_scale": (is_number, "a finite number"),
    # The range of eta, 0 to 1, is checked by DDIM itself.
    "eta": (is_number, "a finite number"),
    "cfg_interval": (_is_interval, "null or [low, high] of sigma / alpha, 0 <= low < high"),
    "cfg_rescale": (lambda x: is_number(x, 0, 1), "a number from 0 to 1"),
    "repeats": (lambda x: is_whole_number(x, 1), "a whole number from 1"),
    "variance": (lambda x: x in ("small", "large", "analytic"), "'small', 'large' or 'analytic'"),
}
