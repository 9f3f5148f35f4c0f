"""Trains one stage: dalle2 train --config=configs/decoder.py:tiny --workdir=W

Configs: clip, prior, ar_prior, decoder, upsampler_256, upsampler_1024. The head of each file lists
its variants: paper, tpu and tiny, and others such as karlo or inpaint. --config.batch_size=32
changes a setting; --show_config lists all settings, and docs/training.md and docs/data.md explain
them. The same command resumes the run where the last one ended.

Exit status: 0 done, or stopped by SIGTERM with everything saved, as the last line says (a scheduler
that preempts a run starts it again by itself); 1 training diverged, or a step took longer than
watchdog_seconds; 2 a mistake in the input, or data or disk failed; 75 not all hosts started within
--wait_seconds, or the run stopped at max_minutes with everything saved; 130 stopped by Ctrl-C
(SIGINT) with everything saved (a second Ctrl-C ends the run at once).

--topology=v5e:8x8 compiles the step for that TPU slice, without a TPU and without a workdir, and
reports what it needs and how fast it could be (docs/tpu.md); status 3 if it does not fit.
"""

from __future__ import annotations

import signal
import sys

from absl import flags, logging
from ml_collections import config_flags

from dalle2_jax import build
from dalle2_jax.cli import commands, show_config, topology
from dalle2_jax.cli.config_flag import ConfigParser
from dalle2_jax.errors import UserError
from dalle2_jax.train import hosts

CONFIG = config_flags.DEFINE_config_file("config", None, "The config: configs/STAGE.py:VARIANT.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and the exported model; or gs://BUCKET/FOLDER.",
)
TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Also write the metrics for TensorBoard.")
SHOW_CONFIG = flags.DEFINE_bool(
    "show_config", False, "Print the complete config, each value with its origin; do nothing else."
)
AUTO_BATCH = topology.only_with_topology("auto_batch", "Find the largest batch that fits.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Run as one of several hosts, which JAX finds by itself on TPUs."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, on machines without TPUs."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of hosts, on machines without TPUs."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this host from 0, on machines without TPUs."
)
WAIT_SECONDS = flags.DEFINE_float(
    "wait_seconds", 600.0, "How long the hosts wait for each other to start.", 1.0, 1e6
)
flags.mark_flag_as_required("config")
flags.FLAGS["config"].parser = PARSER = ConfigParser("config")


def prepare() -> None:
    """Ends the process at a signal, until the training loop installs handlers of its own."""
    signal.signal(signal.SIGINT, commands.stop)
    signal.signal(signal.SIGTERM, commands.stop)


def main() -> int:
    """Trains by the flags and returns the exit status."""
    if SHOW_CONFIG.value:
        for line in show_config.lines(build.complete(CONFIG.value), PARSER.path, sys.argv[1:]):
            print(line)
        return 0
    logging.set_verbosity(logging.INFO)
    commands.keep_compiled_programs()
    if topology.TOPOLOGY.value is not None:
        from dalle2_jax.aot import training  # late, so that mistakes are reported at once

        config = build.complete(build.beside_clip(CONFIG.value, PARSER.path))
        return topology.report(training.report, config, auto_batch=AUTO_BATCH.value)
    topology.check()
    if not WORKDIR.value:
        raise UserError("--workdir is missing: name a folder of checkpoints, metrics and the model")
    hosts.connect(
        DISTRIBUTED.value,
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        wait_seconds=WAIT_SECONDS.value,
    )
    return run(CONFIG.value, WORKDIR.value)


def run(config: build.Config, workdir: str) -> int:
    """Trains the stage of a complete config in `workdir`; returns the exit status."""
    from dalle2_jax.train import loop  # late, as above

    try:
        config = build.complete(config)
        task = build.task(config)
        build.check(config, task)
        train_data = build.dataset(config, config.data.get("split", "train"))
        eval_split = config.data.get("eval_split", "")
        eval_data = build.dataset(config, eval_split) if eval_split else None
        result = loop.train(config, task, train_data, workdir, eval_data, TENSORBOARD.value)
    except (UserError, OSError) as error:
        return commands.say(error, 2)
    except loop.Diverged as error:
        return commands.say(error, 1)
    if result.stopped_by:
        print(
            f"stopped by {result.stopped_by} after step {result.step} of {config.num_steps}: "
            "run the same command again to resume"
        )
    return result.exit_status
