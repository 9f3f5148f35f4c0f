"""The flag --best_of, of the commands that generate: no edit ranks its images."""

from __future__ import annotations

from absl import flags

BEST_OF = flags.DEFINE_integer(
    "best_of",
    None,
    "(generate) Generate this many images for each prompt and keep the --n that CLIP finds nearest "
    "to it. Default: generate --n and keep all.",
    1,
)
