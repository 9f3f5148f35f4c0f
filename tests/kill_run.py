"""A toy run that is killed at a planted point, or from outside; see test_train_kills.py.

Runs in children of multiprocessing's fork server, which has imported all this once.
"""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import toy_task

from dalle2_jax.cli import commands
from dalle2_jax.parallel import sharding
from dalle2_jax.train import checkpoint, loop, manifest


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(point: str, at: int) -> None:
    """Kills this process around the checkpoint of step `at`, or with its rewriting of a file."""
    save, write = checkpoint.Checkpoints.save, manifest.write
    finalize, rmtree, replace = manifest.RenamedFolder.finalize, shutil.rmtree, Path.replace

    def is_it(folder) -> bool:
        return Path(folder).name.split(".")[0] == str(at)

    def before(self, state, *scores):
        return die() if int(state.step) == at else save(self, state, *scores)

    def written(folder):  # the arrays are; the manifest is not
        return die() if is_it(folder) else write(folder)

    def listed(folder):  # the manifest is, half; not renamed yet
        write(folder)
        if is_it(folder):
            path = folder / manifest.NAME
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()

    async def committed(self):  # renamed; older ones are not removed yet
        await finalize(self)
        if is_it(self.get_final()):
            die()

    def removing(folder, *options, **more):
        if any(Path(folder).glob("*")):
            next(p for p in Path(folder).rglob("*") if p.is_file()).unlink()
            die()
        rmtree(folder, *options, **more)

    def renaming(self, target):
        return die() if self.name.startswith(f".{at}.") else replace(self, target)

    if point == "before":
        checkpoint.Checkpoints.save = before
    elif point in ("written", "listed"):
        manifest.write = {"written": written, "listed": listed}[point]
    elif point == "committed":
        manifest.RenamedFolder.finalize = committed
    elif point == "removing":
        checkpoint.shutil.rmtree = removing
    elif point == "renaming":
        Path.replace = renaming
    else:
        raise ValueError(point)


def data(seconds: float, hang_at: int = -1, result=None):
    def batches(start: int):
        for number, batch in enumerate(toy_task.dataset()(start), start):
            if number == hang_at:
                result.put("hangs")
                time.sleep(1000)
            time.sleep(seconds)
            yield batch

    return batches


def digest(state) -> str:
    found = hashlib.sha256()
    for name, value in sharding.flatten(jax.device_get(state)).items():
        found.update(name.encode() + value.tobytes())
    return found.hexdigest()


def run(workdir, num_steps, cache, result=None, seconds=0.0, point="", at=-1, hang_at=-1) -> None:
    """Trains on one device; sends `result` what it came to: (step, stopped by, position, hash)."""
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if point:
        plant(point, at)
    for number in (signal.SIGINT, signal.SIGTERM):  # as train.py does
        signal.signal(number, commands.stop)
    config = toy_task.config(num_steps=num_steps, checkpoint_every=5)
    done = loop.train(config, toy_task.ToyTask(), data(seconds, hang_at, result), workdir)
    if result is not None:
        result.put((done.step, done.stopped_by, int(done.state.position), digest(done.state)))
    raise SystemExit(done.exit_status)
