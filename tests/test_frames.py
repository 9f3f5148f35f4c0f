"""Depth of the calls that a reader has to follow from an entry point to the network."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import toy_task

from dalle2_jax.train import loop

ROOT = Path(__file__).parent.parent
MAX_SAMPLING, MAX_TRAINING = 16, 12

PROBE = """
import os, runpy, sys, traceback
from dalle2_jax.nets.decoder import Decoder

def probe(self, *args, **kwargs):
    frames = [f for f in traceback.extract_stack() if "dalle2_jax/" in f.filename or
              os.path.basename(f.filename) == "sample.py"]
    names = [f"{os.path.basename(f.filename)}:{f.name}" for f in frames[:-1]]
    start = max(i for i, name in enumerate(names) if name == "sample.py:main")
    print("\\n".join(names[start:]), flush=True)
    os._exit(0)

Decoder.__call__ = probe
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("sample.py", run_name="__main__")
"""


def test_from_sample_py_to_the_network(folder, tmp_path):
    flags = ["--prompt=a cat", "--n=1", f"--weights={folder}", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace('"dalle2_jax/"', repr(f"{ROOT}/dalle2_jax/")), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    frames = done.stdout.split()
    assert frames, done.stderr
    assert frames[0] == "sample.py:main"
    assert len(frames) <= MAX_SAMPLING, frames


class Reached(Exception):
    pass


@pytest.mark.usefixtures("one_device")
def test_from_the_training_loop_to_a_tasks_loss(tmp_path):
    frames = []

    class Probe(toy_task.ToyTask):
        def loss(self, params, frozen, batch, key, train):
            if train:
                stack = [f for f in traceback.extract_stack() if "/dalle2_jax/" in f.filename]
                frames.extend(f"{Path(f.filename).name}:{f.name}" for f in stack)
                raise Reached
            return super().loss(params, frozen, batch, key, train)

    with pytest.raises(Reached):
        loop.train(toy_task.config(num_steps=1), Probe(), toy_task.dataset(), tmp_path)
    assert frames[0] == "loop.py:train"
    assert len(frames) <= MAX_TRAINING, frames
