"""Generates images: python sample.py --prompt "a flat emoji of a red apple" --n 4 --out out

Every image is written as a PNG that carries its prompt, seed and settings; grid.png shows all.
--mode edits images (docs/editing.md); --like FILE.png repeats what such a file was made by.
--topology=v5e:1x1 compiles the cascade for that TPU slice, generates nothing and reports what it
needs (docs/tpu.md); --weights=configs/paper then stands for the shapes of those configs.

The same as `dalle2 generate`, `dalle2 edit` and `dalle2 topology`, for a clone.
Exit status: 0 done, 2 a mistake in the input, 3 too large for --topology, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from dalle2_jax.cli import commands  # first: it reports an environment without libraries

# isort: split
from absl import flags

from dalle2_jax.cli import (
    best_of_flag,  # noqa: F401  defines --best_of
    edit_flags,
    generate_flags,
    request,
    sampling_flags,
    topology,
)

MODES = [request.GENERATE, *edit_flags.MODE_NAMES]
MODE = flags.DEFINE_enum(
    "mode", request.GENERATE, MODES, "What to do: generate, or edit images; see docs/editing.md."
)
AUTO_BATCH = topology.only_with_topology("auto_batch", "Find the largest --batch_size that fits.")


def main() -> int:
    """Generates, edits or, with --topology, compiles by the flags; returns the exit status."""
    if topology.TOPOLOGY.value is None:
        topology.check()
        return request.main(MODE.value if MODE.present else None, MODES)
    from dalle2_jax.aot import sampling  # late: a mistake in the flags is reported at once

    return topology.report(
        sampling.report,
        generate_flags.WEIGHTS.value,
        batch_size=generate_flags.BATCH_SIZE.value,
        changes=sampling_flags.read(),
        auto_batch=AUTO_BATCH.value,
        size=generate_flags.SIZE.value,
        prior=generate_flags.PRIOR.value,
    )


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
