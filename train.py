"""Trains one stage: python train.py --config=configs/decoder.py:tiny --workdir=W

Configs: clip, prior, ar_prior, decoder, upsampler_256, upsampler_1024, whose heads tell their
variants: paper, tpu, most karlo and tiny. --config.batch_size=32 changes a setting; which there are
stands in the config's file, in `defaults` of dalle2_jax/build.py and in data/config.py there.

The same command goes on where the last one ended.
Exit status: 0 done, or stopped by SIGTERM with everything saved, as the last line says (a scheduler
that preempts a run starts it again by itself); 1 no gradient is of use any more, or a step took
longer than watchdog_seconds; 2 a mistake in the input, or data or disk failed; 75 not all hosts
came; stopped with everything saved: 75 out of max_minutes, 130 by SIGINT (by a second one at once).

--topology=v5e:8x8 compiles the step for that TPU slice, without a TPU and without a workdir, and
tells what it needs and how fast it could be (docs/tpu.md); status 3 where it does not fit.
"""

from __future__ import annotations

import signal

from dalle2_jax.cli import commands  # first: it tells where no library is installed
from dalle2_jax.errors import UserError

# isort: split
from absl import flags, logging
from ml_collections import config_flags

from dalle2_jax import build
from dalle2_jax.cli import topology
from dalle2_jax.train import hosts

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py:VARIANT")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and the model.")
TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard's files too.")
AUTO_BATCH = topology.only_with_topology("auto_batch", "the largest batch that fits.")
flags.mark_flag_as_required("config")
flags.FLAGS["config"].parser = PARSER = build.ConfigParser("config")


def run(config: build.Config, workdir: str) -> int:
    from dalle2_jax.train import loop  # late: a mistake in the flags is told at once

    try:
        config = build.complete(config)
        task = build.task(config)
        build.check(config, task)
        data = build.dataset(config, config.data.get("split", "train"))
        held_out = config.data.get("eval_split", "")
        eval_data = build.dataset(config, held_out) if held_out else None
        result = loop.train(config, task, data, workdir, eval_data, TENSORBOARD.value)
    except (UserError, OSError) as error:
        return commands.say(error, 2)
    except loop.Diverged as error:
        return commands.say(error, 1)
    if result.stopped_by:
        at = f"after step {result.step} of {config.num_steps}"
        print(f"stopped by {result.stopped_by} {at}: run the same command again to go on")
    return result.exit_status


def main() -> int:
    logging.set_verbosity(logging.INFO)
    commands.keep_compiled_programs()
    if topology.TOPOLOGY.value is not None:
        from dalle2_jax.aot import training  # late, as above

        config = build.complete(build.beside_clip(CONFIG.value, PARSER.path))
        return topology.tell(training.report, config, auto_batch=AUTO_BATCH.value)
    topology.check()
    if not WORKDIR.value:
        raise UserError("--workdir is missing: name a folder of checkpoints, metrics and the model")
    hosts.connect_by_flags()
    return run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, commands.stop)  # until the loop has its own
    signal.signal(signal.SIGTERM, commands.stop)
    commands.run(main)
