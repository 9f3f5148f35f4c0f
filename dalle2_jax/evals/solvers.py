"""The table of `dalle2 evals solvers`: solvers and numbers of steps, compared with DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TOLERANCE = 1.05  # a distance up to 5 % above the reference's counts as equally good


class Case(NamedTuple):
    """One solver with one number of steps, and its scores."""

    solver: str
    steps: int
    evaluations: int  # of the network; Heun's method takes almost two a step
    distance: float  # Frechet distance to the true images
    concept: float  # percentage of images in which the judge finds the concept first
    concept_error: float  # its standard error


def to_markdown(cases: Sequence[Case]) -> str:
    """Formats the cases as a Markdown table.

    The first case is the reference. Of the others that are as good, the one with the fewest network
    evaluations is marked; where several have as few, the one in which the judge finds most.
    """
    reference, *others = cases
    good_enough = [case for case in others if case.distance <= TOLERANCE * reference.distance]
    best = min(good_enough, key=lambda c: (c.evaluations, -c.concept, c.distance), default=None)
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
