"""What a stage's config says of its diffusion, as one object."""

from __future__ import annotations

import dataclasses

from dalle2_jax.diffusion import gaussian, losses, schedules
from dalle2_jax.diffusion.guidance import Apply
from dalle2_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Process:
    """How a stage was noised and what its network predicts (unCLIP, Table 3)."""

    schedule: str = "cosine"
    num_timesteps: int = 1000
    prediction: str = "eps"  # or "x_0", "v"
    learned_variance: bool = False
    weighting: str = "none"  # or "min_snr_<gamma>", "min_v_<gamma>"

    def __post_init__(self) -> None:
        gaussian.check_kind(self.prediction)
        losses.loss_weight(self.training_schedule(), self.prediction, self.weighting)

    def training_schedule(self) -> schedules.Schedule:
        return schedules.make(self.schedule, self.num_timesteps)

    def losses(self, apply: Apply, x_0: Array, t: Array, noise: Array) -> dict[str, Array]:
        """See `losses.training_losses`."""
        return losses.training_losses(
            self.training_schedule(),
            apply,
            x_0,
            t,
            noise,
            kind=self.prediction,
            learned_variance=self.learned_variance,
            weighting=self.weighting,
        )
