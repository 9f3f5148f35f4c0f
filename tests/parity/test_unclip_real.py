"""Karlo's networks at their real size against the originals, one after another.

Each side runs in a process of its own, which gives its memory back: 9 GB at most, the upsampler's
two networks in ours.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

HERE = Path(__file__).parent
pytestmark = [pytest.mark.parity, pytest.mark.slow]
TOLERANCE = 2e-4  # of the output's scale
OUTPUTS = {
    "clip": {"z_txt", "txt_enc", "z_img"},
    "prior": {"out"},
    "decoder": {"out"},
    "upsampler": {"super_res_first", "super_res_last"},
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_real_size(stage, tmp_path):
    """Exact numbers of parameters, which originals.py asserts, and the outputs."""
    folder = tmp_path / stage
    try:
        run("originals.py", folder, stage)
        errors = json.loads(run("imported.py", folder, stage).splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert set(errors) == OUTPUTS[stage]
    assert max(errors.values()) <= TOLERANCE, errors


def run(script: str, *args) -> str:
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    env.pop("XLA_FLAGS", None)  # conftest's make programs that are slow to run
    command = [sys.executable, HERE / script, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
