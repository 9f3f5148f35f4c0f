"""dalle2 evals inpainting: its tables and its grid, and the measure of seams."""

from pathlib import Path

import numpy as np
import pytest
import small_judge
from command import MAIN, run

from dalle2_jax.evals import seams

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def test_tables_and_grid(folder, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    flags = [f"--weights={folder}", f"--judge={judge}", f"--data={FIXTURE}", "--subset="]
    done = run(*MAIN, "evals", "inpainting", *flags, "--num=2", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    for name in ("middle: generated", "right half: erased", "left half, extended", "true images"):
        assert f"| held-out pairs: {name} | 2 |" in done.stdout
    assert "| all but the middle |" in done.stdout
    assert done.stdout.strip().endswith(str(tmp_path / "out" / "inpainting.png"))
    assert (tmp_path / "out" / "inpainting.png").is_file()


def test_a_step_in_colour_counts_only_across_the_seam():
    edit_mask = seams.edit_masks(32)["right half"]
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[:, :, 16:] = 60
    assert seams.measure(images, edit_mask) == (60.0, 0.0)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (2, 32, 32, 3))
    across, beside = seams.measure(ramp, edit_mask)
    assert across == 1.0
    # 4 columns are near the edge. A row has 3 horizontal pairs of them beside the seam, each one
    # step apart; a column has 31 vertical pairs, which are equal.
    assert beside == pytest.approx(3 * 32 / (3 * 32 + 4 * 31))
    middle = seams.edit_masks(32)["middle"]
    assert middle.sum() == 16 * 16
    assert seams.measure(images, middle).across == pytest.approx(0.0)
