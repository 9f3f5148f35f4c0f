"""The diffusion process of a stage, as its config describes it."""

from __future__ import annotations

import dataclasses

from dalle2_jax.diffusion import gaussian, losses, schedules


@dataclasses.dataclass(frozen=True)
class Process:
    """The noise process of a stage and the prediction of its network (unCLIP, Table 3).

    Attributes:
        schedule: the noise schedule, "cosine" or "linear".
        num_timesteps: steps of training; sampling takes some of them.
        prediction: what the network predicts: "eps", "x_0" or "v".
        learned_variance: whether the network also predicts the variance of p(x_{t-1} | x_t).
        weighting: of the loss over t: "none", "min_snr_<gamma>" or "min_v_<gamma>", see
            `losses.loss_weight`.
    """

    schedule: str = "cosine"
    num_timesteps: int = 1000
    prediction: str = "eps"
    learned_variance: bool = False
    weighting: str = "none"

    def __post_init__(self) -> None:
        # Both raise on bad values: a config fails when it is read, not at the first step.
        gaussian.check_kind(self.prediction)
        losses.loss_weight(self.training_schedule(), self.prediction, self.weighting)

    def training_schedule(self) -> schedules.Schedule:
        """Returns the schedule with all timesteps."""
        return schedules.make(self.schedule, self.num_timesteps)
