"""dalle2 evals manipulations: its tables, and what a way's table says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_judge
from command import MAIN

from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.evals.ways import Way, to_markdown, ways

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def rows(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_a_table_of_variations_and_one_of_each_way(tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    command = [
        sys.executable,
        "-m",
        "dalle2_jax.cli.main",
        "evals",
        "manipulations",
        "--size=32",
        "--steps=8",
    ]
    command += [f"--judge={judge}", f"--data={FIXTURE}", "--subset="]
    command += ["--num=2", "--num_ways=2", "--frames=3", "--eta=0", "--eta=1", "--theta=0.4"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    varied, *ways = (part for part in done.stdout.split("\n\n") if part.startswith("|"))
    found = {row[0]: row[3] for row in rows(varied)}
    names = ["drawn from the caption", "reconstructed", "varied, eta 0", "varied, eta 1"]
    names.append("true pictures")
    assert list(found) == [f"{of} pairs: {name}" for of in ("seen", "held-out") for name in names]
    assert not found["seen pairs: drawn from the caption"]  # a picture of its own
    kept, changed = (float(found[f"seen pairs: varied, eta {eta}"]) for eta in (0, 1))
    assert kept > changed + 0.2
    shares = [[row[0] for row in rows(table)] for table in ways]
    assert shares == [["0.00", "0.50", "1.00"]] + 3 * [["0.00", "0.20", "0.40"]]


def test_a_picture_that_becomes_the_other_is_seen_to(tmp_path):
    judge = Judge.load(small_judge.write(tmp_path / "judge"))
    starts, ends = [("red apple", "noto")], [("cat face", "twemoji")]
    start, end = judge.embed_pairs(starts)[0], judge.embed_pairs(ends)[0]

    class Sees(Judge):
        def embed_pictures(self, pictures: np.ndarray) -> np.ndarray:
            return np.stack([start, end])[pictures[:, 0, 0, 0]]  # a picture's colour says which

    frames = np.zeros((1, 2, 8, 8, 3), np.uint8)
    frames[:, 1] = 1
    told = rows(to_markdown(Sees(**vars(judge)), frames, starts, Way("", ends, None, 0.5)))
    between = f"{100 * start @ end:.1f}"
    assert told == [["0.00", "100.0", between, "0"], ["0.50", between, "100.0", "100"]]


def test_every_way_leads_somewhere():
    pairs = [("ant", "noto"), ("ant", "twemoji"), ("bee", "noto"), ("ant", "fluent-emoji")]
    given = Group("", pairs, np.zeros((4, 8, 8, 3), np.uint8))
    to_picture, to_style, *to_concept = ways(None, given, 3, 0.5, 0, {})
    assert to_picture.ends == [*pairs[1:], pairs[0]]
    styled = zip(pairs, to_style.ends, strict=True)
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in styled)
    for way in to_concept:
        assert [concept for concept, _ in way.ends] == ["bee", "bee", "ant", "bee"]
        assert [style for _, style in way.ends] == [style for _, style in pairs]


@pytest.mark.parametrize(
    ("flag", "told"), [("--theta=2", "theta"), ("--frames=1", "frames"), ("--eta=2", "eta")]
)
def test_a_mistake_is_one_line(flag, told):
    command = [sys.executable, *MAIN, "evals", "manipulations", flag]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
