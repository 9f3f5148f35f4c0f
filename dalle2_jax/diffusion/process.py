"""The diffusion process of a stage, as its config describes it."""

from __future__ import annotations

import dataclasses

from dalle2_jax.diffusion import gaussian, losses, schedules


@dataclasses.dataclass(frozen=True)
class Process:
    """The noise process of a stage and the prediction of its network (unCLIP, Table 3)."""

    schedule: str = "cosine"
    num_timesteps: int = 1000
    prediction: str = "eps"  # or "x_0", "v"
    learned_variance: bool = False
    weighting: str = "none"  # or "min_snr_<gamma>", "min_v_<gamma>"

    def __post_init__(self) -> None:
        # Both raise on bad values: a config fails when it is read, not at the first step.
        gaussian.check_kind(self.prediction)
        losses.loss_weight(self.training_schedule(), self.prediction, self.weighting)

    def training_schedule(self) -> schedules.Schedule:
        """Returns the schedule with all timesteps."""
        return schedules.make(self.schedule, self.num_timesteps)
