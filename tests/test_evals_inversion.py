"""dalle2 evals inversion: a table with one line for each case."""

from pathlib import Path

import command
import pytest

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def run(*flags: str):
    return command.run(*command.MAIN, "evals", "inversion", *flags)


def test_one_line_for_each_case(folder):
    done = run(
        *(f"--weights={folder}", f"--data={FIXTURE}", "--subset=", "--num=2", "--batch_size=2"),
        *("--steps=2", "--steps=4", "--iterations=1"),
    )
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.strip().splitlines()
    assert head.startswith("| steps | iterations | PSNR, dB")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["2", "1"], ["4", "1"]]
    assert all(0 < float(worst) <= float(mean) < 60 for _, _, mean, worst, _ in cells)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num=0"], "--num=0: 0 is not "),
        (["--data=nowhere"], "nowhere"),
        ([f"--data={FIXTURE}", "--subset=", "--steps=99"], "steps must be at most 20"),
    ],
)
def test_a_mistake_is_one_line(flags, message, folder):
    done = run(f"--weights={folder}", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
