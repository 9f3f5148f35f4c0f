"""dalle2 evals inpainting, and what it says of seams."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_judge

from dalle2_jax.evals import seams

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def test_tables_and_pictures(folder, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    command = [
        sys.executable,
        "-m",
        "dalle2_jax.cli.main",
        "evals",
        "inpainting",
        f"--weights={folder}",
    ]
    command += [f"--judge={judge}", f"--data={FIXTURE}", "--subset=", "--num=2"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    for name in ("middle: drawn", "right half: erased", "left half, continued", "true pictures"):
        assert f"| held-out pairs: {name} | 2 |" in done.stdout
    assert "| all but the middle |" in done.stdout
    assert done.stdout.strip().endswith(str(tmp_path / "out" / "inpainting.png"))
    assert (tmp_path / "out" / "inpainting.png").is_file()


def test_a_step_in_colour_at_a_seam_is_seen_there_alone():
    mask = seams.masks(32)["right half"]
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    pictures[:, :, 16:] = 60
    assert seams.across(pictures, mask) == (60.0, 0.0)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (2, 32, 32, 3))
    over, beside = seams.across(ramp, mask)
    assert over == 1.0
    # 4 columns lie by the edge: 3 pairs beside each other, and 31 above, which are alike.
    assert beside == pytest.approx(3 * 32 / (3 * 32 + 4 * 31))
    hole = seams.masks(32)["middle"]
    assert hole.sum() == 16 * 16 and seams.across(pictures, hole)[0] == pytest.approx(0.0)
