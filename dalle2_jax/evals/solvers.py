"""The table of `dalle2 evals solvers`: solvers and numbers of steps, compared with DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WITHIN = 1.05  # of the reference's distance


class Case(NamedTuple):
    solver: str
    steps: int
    evaluations: int
    distance: float
    concept: float  # per cent
    concept_error: float


def to_markdown(cases: Sequence[Case]) -> str:
    """A table of `cases`, of which the first is the reference."""
    reference, *others = cases
    enough = [case for case in others if case.distance <= WITHIN * reference.distance]
    best = min(enough, key=lambda c: (c.evaluations, -c.concept, c.distance), default=None)
    lines = [
        "| solver | steps | evaluations | Frechet distance | concept first, % | |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        note = "the reference" if case is reference else "fewest within 5 %" * (case is best)
        cells = [
            case.solver,
            str(case.steps),
            str(case.evaluations),
            f"{case.distance:.1f}",
            f"{case.concept:.0f} ± {case.concept_error:.0f}",
            note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
