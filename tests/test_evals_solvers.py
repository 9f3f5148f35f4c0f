"""dalle2 evals solvers: a line for each case, the cheapest good one marked."""

from pathlib import Path

import command
import pytest
import small_judge

from dalle2_jax.evals.solvers import Case, to_markdown

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def run(folder, tmp_path, *flags: str):
    judge = small_judge.write(tmp_path / "judge")
    flags = (f"--weights={folder}", f"--judge={judge}", f"--data={FIXTURE}", "--subset=", *flags)
    return command.run(*command.MAIN, "evals", "solvers", *flags)


def rows(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_a_table_for_each_stage(folder, tmp_path):
    done = run(
        *(folder, tmp_path, "--num=3", "--stages=decoder,upsampler_16", "--solvers=ddim,heun"),
        *("--steps=2", "--steps=3", "--reference=5", "--batch_size=3"),
    )
    assert done.returncode == 0, done.stderr
    tables = [part for part in done.stdout.strip().split("\n\n") if part.startswith("|")]
    assert [part for part in done.stdout.split() if part in ("decoder", "upsampler_16")]
    assert len(tables) == 2
    for table in tables:
        expected = [["ddpm", "5", "5"], ["ddim", "2", "2"], ["ddim", "3", "3"]]
        assert [row[:3] for row in rows(table)] == [
            *expected,
            ["heun", "2", "3"],
            ["heun", "3", "5"],
        ]
        assert rows(table)[0][-1] == "the reference"


def test_the_fewest_evaluations_within_five_per_cent_are_marked():
    cases = [
        Case("ddpm", 250, 250, 10.0, 50, 5),
        Case("ddim", 5, 5, 10.6, 50, 5),
        Case("ddim", 10, 10, 10.4, 50, 5),
        Case("unipc", 10, 10, 10.4, 60, 5),
        Case("dpm++", 10, 10, 10.3, 50, 5),
        Case("heun", 8, 15, 9.0, 50, 5),
    ]
    marked = [row[0] for row in rows(to_markdown(cases)) if "within" in row[-1]]
    assert marked == ["unipc"]
    assert "within" not in to_markdown(cases[:2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages=decodr"], "--stages=decodr: there is no such stage; did you mean"),
        (["--solvers=dimm"], "unknown sampler 'dimm'"),
        (["--steps=21"], "steps must be at most 20"),
        (["--num=1"], "--num=1: 1 is not integer >= 2"),
    ],
)
def test_a_mistake_is_one_line(flags, message, folder, tmp_path):
    done = run(folder, tmp_path, "--reference=5", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
