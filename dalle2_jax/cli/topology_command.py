"""Compiles for a TPU slice that is not attached, and reports memory and speed.

    dalle2 topology v5e:8x8 --config=configs/decoder.py:paper --config.batch_size=512
    dalle2 topology v5e:1x1 --weights=configs/paper --batch_size=8

The first compiles a training step. The second compiles generating with a cascade: a model folder, a
hub id, or `configs/VARIANT` for the shapes of those configs. Nothing is run. No TPU is needed, but
the extra `tpu` is. docs/tpu.md explains the report.
Exit status: 0 it fits, 2 a mistake in the input, 3 it does not fit, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from dalle2_jax import build
from dalle2_jax.cli import commands, sampling_flags, topology
from dalle2_jax.cli.config_flag import ConfigParser
from dalle2_jax.errors import UserError

WORDS = ("SLICE",)

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py:VARIANT to train.")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "Model to generate with: a folder, a hub id, or configs/VARIANT."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "(--weights) Images generated at a time.")
SIZE = flags.DEFINE_integer("size", None, "(--weights) Side of the images in pixels.")
PRIOR = flags.DEFINE_enum(
    "prior", None, ["diffusion", "ar", "none"], "(--weights) The prior to generate with."
)
AUTO_BATCH = flags.DEFINE_bool("auto_batch", False, "Find the largest batch that fits.")
flags.FLAGS["config"].parser = PARSER = ConfigParser("config")


def main(slice_name: str) -> int:
    """Reports on the TPU slice `slice_name`, as v5e:8x8; returns the exit status."""
    if (CONFIG.value is None) == (WEIGHTS.value is None):
        raise UserError("give --config=configs/STAGE.py:VARIANT or --weights=MODEL, one of them")
    topology.TOPOLOGY.value = slice_name  # pyright: ignore[reportAttributeAccessIssue]
    commands.keep_compiled_programs()
    if CONFIG.value is not None:
        from dalle2_jax.aot import training  # late, so that mistakes are reported at once

        config = build.complete(build.beside_clip(CONFIG.value, PARSER.path))
        return topology.report(training.report, config, auto_batch=AUTO_BATCH.value)
    from dalle2_jax.aot import sampling

    return topology.report(
        sampling.report,
        WEIGHTS.value,
        batch_size=BATCH_SIZE.value,
        changes=sampling_flags.read(),
        auto_batch=AUTO_BATCH.value,
        size=SIZE.value,
        prior=PRIOR.value,
    )
