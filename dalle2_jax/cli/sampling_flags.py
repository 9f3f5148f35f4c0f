"""The flags of sample.py that say how the stages are drawn, as `Cascade.with_settings` takes them.

Nothing is imported here that takes time or starts threads, as in `modes`.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from dalle2_jax.cli import commands

STEPS = flags.DEFINE_string(
    "steps", None, "Of the decoder, as 50, or 10:10:3:2:2 in parts of time; or STAGE=STEPS,..."
)
CFG_SCALE = flags.DEFINE_string("cfg_scale", None, "Of the decoder, or STAGE=W,STAGE=W; 1 is off.")
SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddpm, ddim, dpm++, dpm++3m, dpm++sde, unipc or heun; or STAGE=NAME,..."
)
CFG_INTERVAL = flags.DEFINE_string(
    "cfg_interval", None, "LOW:HIGH of sigma / alpha within which is guided, or STAGE=LOW:HIGH,..."
)
CFG_RESCALE = flags.DEFINE_string(
    "cfg_rescale", None, "How far guidance keeps the contrast, 0 to 1; or STAGE=SHARE,..."
)
VARIANCE = flags.DEFINE_string(
    "variance", None, "Of ddpm's noise: STAGE=small, large or analytic,..."
)
_NAMES = {"solver": SAMPLER, "variance": VARIANCE}


def read() -> dict[str, Any]:
    """The arguments of `with_settings`; UserError for a flag that cannot be read."""
    kinds = [
        (STEPS, counts, "50 or 10:10:3:2:2"),
        (CFG_SCALE, float, "a number"),
        (CFG_INTERVAL, interval, "LOW:HIGH"),
        (CFG_RESCALE, float, "a number"),
    ]
    chosen = {kind[0].name: commands.choice(*kind) for kind in kinds}
    return chosen | {name: commands.choice(flag, str, "a name") for name, flag in _NAMES.items()}


def counts(text: str) -> int | tuple[int, ...]:
    """50, or 10:10:3:2:2; ValueError for anything else."""
    first, *more = map(int, text.split(":"))
    return (first, *more) if more else first


def interval(text: str) -> tuple[float, float]:
    """LOW:HIGH; ValueError for anything else."""
    low, high = map(float, text.split(":"))
    return low, high
