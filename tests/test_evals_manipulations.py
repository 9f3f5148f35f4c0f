"""dalle2 evals manipulations: its tables, and the judge's table of a transition."""

from pathlib import Path

import numpy as np
import pytest
import small_judge
from command import MAIN, run

from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.evals.transitions import Transition, to_markdown, transitions

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def rows(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_a_table_of_variations_and_one_of_each_transition(tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    flags = ["--size=32", "--steps=8", f"--judge={judge}", f"--data={FIXTURE}", "--subset="]
    flags += ["--num=2", "--num_transitions=2", "--frames=3", "--eta=0", "--eta=1", "--theta=0.4"]
    done = run(*MAIN, "evals", "manipulations", *flags)
    assert done.returncode == 0, done.stderr
    variations, *others = (part for part in done.stdout.split("\n\n") if part.startswith("|"))
    psnr = {row[0]: row[3] for row in rows(variations)}
    names = ["generated from the caption", "reconstructed", "variation, eta 0", "variation, eta 1"]
    names.append("true images")
    assert list(psnr) == [f"{of} pairs: {name}" for of in ("seen", "held-out") for name in names]
    assert not psnr["seen pairs: generated from the caption"]  # it does not start from the original
    eta_0, eta_1 = (float(psnr[f"seen pairs: variation, eta {eta}"]) for eta in (0, 1))
    assert eta_0 > eta_1 + 0.2
    shares = [[row[0] for row in rows(table)] for table in others]
    assert shares == [["0.00", "0.50", "1.00"]] + 3 * [["0.00", "0.20", "0.40"]]


def test_the_judge_sees_an_image_become_the_other(tmp_path):
    judge = Judge.load(small_judge.write(tmp_path / "judge"))
    starts, ends = [("red apple", "noto")], [("cat face", "twemoji")]
    start, end = judge.embed_pairs(starts)[0], judge.embed_pairs(ends)[0]

    class Oracle(Judge):
        def embed_images(self, images: np.ndarray) -> np.ndarray:
            return np.stack([start, end])[images[:, 0, 0, 0]]  # red 0 is the start, 1 the end

    frames = np.zeros((1, 2, 8, 8, 3), np.uint8)
    frames[:, 1] = 1
    table = to_markdown(Oracle(**vars(judge)), frames, starts, Transition("", ends, None, 0.5))
    between = f"{100 * start @ end:.1f}"
    assert rows(table) == [["0.00", "100.0", between, "0"], ["0.50", between, "100.0", "100"]]


def test_every_transition_ends_elsewhere():
    pairs = [("ant", "noto"), ("ant", "twemoji"), ("bee", "noto"), ("ant", "fluent-emoji")]
    group = Group("", pairs, np.zeros((4, 8, 8, 3), np.uint8))
    to_image, to_style, *to_concept = transitions(None, group, 3, 0.5, 0, 8)
    assert to_image.ends == [*pairs[1:], pairs[0]]
    styled = zip(pairs, to_style.ends, strict=True)
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in styled)
    for transition in to_concept:
        assert [concept for concept, _ in transition.ends] == ["bee", "bee", "ant", "bee"]
        assert [style for _, style in transition.ends] == [style for _, style in pairs]


@pytest.mark.parametrize(
    ("flag", "name"), [("--theta=2", "theta"), ("--frames=1", "frames"), ("--eta=2", "eta")]
)
def test_a_mistake_is_one_line(flag, name):
    done = run(*MAIN, "evals", "manipulations", flag)
    assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr
