"""Transitions: interpolations and text diffs of a group's images, and the judge's view of them.

A transition turns an image that shows one (concept, style) into an image that shows another, in a
few frames. The judge scores each frame against both ends; the score of the start should fall and
the score of the end should rise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dalle2_jax.data.emoji.words import STYLES, caption
from dalle2_jax.evals.groups import Group
from dalle2_jax.evals.judge import Judge
from dalle2_jax.pipelines.dalle2 import DALLE2

Pair = tuple[str, str]


class Transition(NamedTuple):
    """One kind of edit, applied to every image of a group.

    Attributes:
        name: title of its table.
        ends: the (concept, style) that each image is to become.
        generate: index of an image -> its frames, uint8 [frames, h, w, 3].
        last_share: share of the way from start to end that the last frame reaches.
    """

    name: str
    ends: Sequence[Pair]
    generate: Callable[[int], np.ndarray]
    last_share: float


def transitions(
    model: DALLE2, group: Group, frames: int, theta: float, seed: int, steps: int
) -> list[Transition]:
    """Returns the transitions that are evaluated.

    Each image of the group is interpolated to the next image, and turned by text diffs to the next
    style and to the next other concept of the group.

    Args:
        frames: images in each transition.
        theta: share of the angle that text diffs turn.
        seed: seed of the interpolations.
        steps: the decoder's steps.
    """
    pairs, styles = list(group.pairs), list(STYLES)
    # Each image's end: the next pair of the group, the same concept in the next style, and the next
    # other concept in the same style (itself, if the group has one concept only).
    next_pairs = [*pairs[1:], pairs[0]]
    restyled = [(c, styles[(styles.index(s) + 1) % len(styles)]) for c, s in pairs]
    renamed = []
    for i, (concept, style) in enumerate(pairs):
        others = (c for c, _ in pairs[i + 1 :] + pairs[:i] if c != concept)
        renamed.append((next(others, concept), style))

    def interpolate(i: int) -> np.ndarray:
        a, b = group.images[i], group.images[(i + 1) % len(pairs)]
        return model.interpolate(a, b, frames, seed, steps=steps, batch_size=frames)

    def text_diff(ends: Sequence[Pair], old_text: str = "") -> Callable[[int], np.ndarray]:
        def generate(i: int) -> np.ndarray:
            return model.text_diff(
                group.images[i],
                caption(*ends[i]),
                old_text or caption(*pairs[i]),
                frames,
                theta=theta,
                steps=steps,
                batch_size=frames,
            )

        return generate

    return [
        Transition("interpolation to another image", next_pairs, interpolate, 1.0),
        Transition("text diff to another style", restyled, text_diff(restyled), theta),
        Transition("text diff to another concept", renamed, text_diff(renamed), theta),
        Transition('the same from "a photo"', renamed, text_diff(renamed, "a photo"), theta),
    ]


def to_markdown(
    judge: Judge, frames: np.ndarray, starts: Sequence[Pair], transition: Transition
) -> str:
    """Scores the frames of a transition and formats them as a Markdown table, one line a frame.

    Args:
        frames: uint8 [n, k, h, w, 3], k frames of each of n images.
        starts: the (concept, style) of the n images.

    Returns:
        The share of the way, 100 times the mean cosines of a frame with the start and with the end,
        and the percentage of images that are nearer to the end.
    """
    n, k = frames.shape[:2]
    # All frames in one call, since the judge batches; then [n, k, dim] again.
    z = judge.embed_images(frames.reshape(n * k, *frames.shape[2:])).reshape(n, k, -1)
    start_scores, end_scores = (
        100 * np.einsum("nkd,nd->nk", z, judge.embed_pairs(pairs))
        for pairs in (starts, transition.ends)
    )
    lines = [
        "| share of the way | score of the start | score of the end | nearer to the end, % |",
        "|---|---|---|---|",
    ]
    for i, share in enumerate(np.linspace(0, transition.last_share, k)):
        start, end = start_scores[:, i], end_scores[:, i]
        nearer = 100 * np.mean(end > start)
        lines.append(f"| {share:.2f} | {start.mean():.1f} | {end.mean():.1f} | {nearer:.0f} |")
    return "\n".join(lines)
