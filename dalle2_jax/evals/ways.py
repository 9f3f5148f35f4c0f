"""Ways that lead from given pictures to others, step by step, and what a judge sees on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.data.emoji.words import STYLES, caption
from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.pipelines.dalle2 import DALLE2

Pair = tuple[str, str]


class Way(NamedTuple):
    """From pictures of some (concept, style) to those of others."""

    name: str
    ends: Sequence[Pair]
    draw: Callable[[int], np.ndarray]  # the place of a picture -> uint8 [frames, h, w, 3]
    most: float  # the share of the way that is gone


def ways(
    model: DALLE2, given: Group, frames: int, theta: float, seed: int, options: Any
) -> list[Way]:
    """Each picture goes to the next picture, to the next style, and to the next other concept.

    `theta` is that of text diffs, `options` those of `DALLE2.text_diff`.
    """
    pairs, names = list(given.pairs), list(STYLES)
    following = [*pairs[1:], pairs[0]]
    restyled = [(c, names[(names.index(s) + 1) % len(names)]) for c, s in pairs]
    renamed = []
    for place, (concept, style) in enumerate(pairs):
        others = (c for c, _ in pairs[place + 1 :] + pairs[:place] if c != concept)
        renamed.append((next(others, concept), style))

    def between(place: int) -> np.ndarray:
        a, b = given.pictures[place], given.pictures[(place + 1) % len(pairs)]
        return model.interpolate(a, b, frames, seed, **options)

    def turned(ends: Sequence[Pair], old: str = "") -> Callable[[int], np.ndarray]:
        def draw(place: int) -> np.ndarray:
            was, new = old or caption(*pairs[place]), caption(*ends[place])
            return model.text_diff(given.pictures[place], new, was, frames, theta=theta, **options)

        return draw

    return [
        Way("interpolation to another picture", following, between, 1.0),
        Way("text diff to another style", restyled, turned(restyled), theta),
        Way("text diff to another concept", renamed, turned(renamed), theta),
        Way('the same from "a photo"', renamed, turned(renamed, "a photo"), theta),
    ]


def to_markdown(judge: Judge, frames: np.ndarray, starts: Sequence[Pair], way: Way) -> str:
    """A line a step: 100 cosines of frames uint8 [n, k, h, w, 3] with what both ends show."""
    n, k = frames.shape[:2]
    z = judge.embed_pictures(frames.reshape(n * k, *frames.shape[2:])).reshape(n, k, -1)
    old, new = (
        100 * np.einsum("nkd,nd->nk", z, judge.embed_pairs(pairs)) for pairs in (starts, way.ends)
    )
    lines = [
        "| share of the way | score of the start | score of the end | nearer to the end, % |",
        "|---|---|---|---|",
    ]
    for place, share in enumerate(np.linspace(0, way.most, k)):
        a, b = old[:, place], new[:, place]
        nearer = 100 * np.mean(b > a)
        lines.append(f"| {share:.2f} | {a.mean():.1f} | {b.mean():.1f} | {nearer:.0f} |")
    return "\n".join(lines)
