"""Flags of how the stages are sampled, as `SamplingOptions` takes them; docs/sampling.md.

Each is one value, which is the decoder's (that of --sampler every stage's), or STAGE=VALUE,...
Without a flag, what the model folder says holds. Nothing that takes time is imported here.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from dalle2_jax.cli import commands

STEPS = flags.DEFINE_string(
    "steps",
    None,
    "Sampling steps: 50 for the decoder, or per stage as prior=16,decoder=50. 10:10:3:2:2 sets the "
    "steps in each fifth of the schedule, from the cleanest to the noisiest. Default: the model's "
    "steps; for edits that invert an image, 50.",
)
CFG_SCALE = flags.DEFINE_string(
    "cfg_scale",
    None,
    "Guidance scale of the decoder, or STAGE=SCALE,...; 1 is off. Default: the model's.",
)
SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "Solver of all stages: ddpm, ddim, dpm++, dpm++3m, dpm++sde, unipc or heun; or STAGE=NAME,... "
    "Default: the model's.",
)
CFG_INTERVAL = flags.DEFINE_string(
    "cfg_interval",
    None,
    "Noise levels sigma / alpha of the decoder between which guidance acts, as LOW:HIGH; or "
    "STAGE=LOW:HIGH,... Default: the model's.",
)
CFG_RESCALE = flags.DEFINE_string(
    "cfg_rescale",
    None,
    "How far guidance of the decoder is rescaled to keep the contrast, 0 (not at all) to 1; or "
    "STAGE=SHARE,... Default: the model's.",
)
VARIANCE = flags.DEFINE_string(
    "variance",
    None,
    "Variance of ddpm's noise in the decoder: small, large or analytic; or STAGE=NAME,... Default: "
    "the model's.",
)


def read() -> dict[str, Any]:
    """Returns the fields of `SamplingOptions`; raises UserError for a flag that cannot be read."""
    return {
        "steps": commands.by_stage(STEPS, _counts, "50 or 10:10:3:2:2"),
        "cfg_scale": commands.by_stage(CFG_SCALE, float, "a number"),
        "solver": commands.by_stage(SAMPLER, str, "a name"),
        "cfg_interval": commands.by_stage(CFG_INTERVAL, _interval, "LOW:HIGH"),
        "cfg_rescale": commands.by_stage(CFG_RESCALE, float, "a number"),
        "variance": commands.by_stage(VARIANCE, str, "a name"),
    }


def _counts(text: str) -> int | tuple[int, ...]:
    """Reads 50, or 10:10:3:2:2; raises ValueError for anything else."""
    first, *more = map(int, text.split(":"))
    return (first, *more) if more else first


def _interval(text: str) -> tuple[float, float]:
    """Reads LOW:HIGH; raises ValueError for anything else."""
    low, high = map(float, text.split(":"))
    return low, high
