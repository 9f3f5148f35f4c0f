"""One host of a toy run, for tests: python host_run.py RANK HOSTS PORT SETTINGS (a JSON object).

Settings: workdir, config (changes to the toy's), seconds (a batch takes), hang_at (the batch that
never comes) on hang_rank, slow_to_compile (seconds that a program takes rank 1), poison_at (batches
that give no gradient), restore (write what the newest checkpoint holds to restored.npz, then
train), wait (for the other hosts, seconds). Its end stands in WORKDIR/state.npz, but not in a
bucket.
"""

import json
import os
import signal
import sys
import time

RANK, HOSTS, PORT = (int(argument) for argument in sys.argv[1:4])
SETTINGS = json.loads(sys.argv[4])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)

# isort: split
import fake_bucket
import jax
import numpy as np
import toy_task

from dalle2_jax.cli import commands
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import paths
from dalle2_jax.train import hosts, loop
from dalle2_jax.train.checkpoint import Checkpoints
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state

WORKDIR = paths.to_path(SETTINGS["workdir"])
if paths.is_remote(WORKDIR):
    fake_bucket.set_up_orbax(setattr)


def own_share(start: int):
    batches = toy_task.dataset(poison_at=SETTINGS.get("poison_at", ()))
    for number, batch in enumerate(batches(start), start):
        if number == SETTINGS.get("hang_at") and SETTINGS.get("hang_rank") == RANK:
            print("hangs", flush=True)
            time.sleep(1000)
        time.sleep(SETTINGS.get("seconds", 0.0))
        rows = len(batch["image"]) // HOSTS
        yield {"image": batch["image"][RANK * rows : (RANK + 1) * rows]}


class Task(toy_task.ToyTask):
    def loss(self, *args):
        if RANK == 1:  # while tracing
            time.sleep(SETTINGS.get("slow_to_compile", 0.0))
        return super().loss(*args)


def write_state(state, name: str) -> None:
    from jax.experimental import multihost_utils

    whole = multihost_utils.process_allgather(state, tiled=True) if HOSTS > 1 else state
    if RANK == 0:
        np.savez(WORKDIR / name, **sharding.flatten(jax.device_get(whole)))


def restore(config, task):
    opt = make_optimizer(config.optimizer, config.num_steps)
    mesh = sharding.make_mesh(config.mesh)
    template = abstract_state(task, opt, config.seed, mesh, config.sharding_rules)
    with Checkpoints(WORKDIR, 3) as checkpoints:
        return checkpoints.restore_latest(template)


def main() -> int:
    if HOSTS > 1:
        print("joins", flush=True)
        hosts.connect(False, f"localhost:{PORT}", HOSTS, RANK, SETTINGS.get("wait", 60.0))
    config, task = toy_task.config(**SETTINGS.get("config", {})), Task()
    if SETTINGS.get("restore"):
        write_state(restore(config, task), "restored.npz")
        print("restored", flush=True)
    result = loop.train(config, task, own_share, WORKDIR, own_share)
    print("stopped by", result.stopped_by, "after", result.step, flush=True)
    if not result.stopped_by and not paths.is_remote(WORKDIR):
        write_state(result.state, "state.npz")
    return result.exit_status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, commands.stop)
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(commands.say(error, error.exit_status))
