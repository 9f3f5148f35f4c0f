"""Splits of the emoji set: what is trained on and what is held out, by a fixed hash of names.

    train              pairs (concept, style) with all their backgrounds but the held-out ones
    validation         5 % of pairs: to choose settings, such as guidance, steps and rounds
    held_out_pairs     10 % of pairs; the concept is trained in other styles
    held_out_triples   5 % of (concept, style, background) whose pairs are trained
    held_out_concepts  2 % of concepts, in every style
    held_out_styles    the evaluation styles, of which nothing is trained

A split follows from sha256 of names, so it survives another order, another size and other package
versions. Nobody looks at the held-out splits before a model is final; `validation` is for that.

What is held out is both images and words. A concept whose name stands in the name of another
("egg" in "nest with eggs") cannot be held out, because a trained caption would teach it: it stays
in train. Keywords and captions that name a held-out concept are dropped from every other concept's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from dalle2_jax.data import attributes
from dalle2_jax.data.emoji import words
from dalle2_jax.data.emoji.words import unit_hash

TRAIN, VALIDATION = "train", "validation"
HELD_OUT_PAIRS, HELD_OUT_TRIPLES = "held_out_pairs", "held_out_triples"
HELD_OUT_CONCEPTS, HELD_OUT_STYLES = "held_out_concepts", "held_out_styles"
# In the order in which they are written: an image that an earlier split shows is left out of a
# later one.
SPLITS = (
    TRAIN,
    VALIDATION,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    HELD_OUT_CONCEPTS,
    HELD_OUT_STYLES,
)

_CONCEPT_SHARE = 0.02
_PAIR_SHARE = 0.10
_VALIDATION_SHARE = 0.05
_TRIPLE_SHARE = 0.05
_STYLES_LEFT_IN_TRAIN = 2


def held_out_concepts(names: Mapping[str, str]) -> frozenset[str]:
    """Returns the ids of the concepts that are held out in every style.

    Args:
      names: concept id -> name, of all concepts of the set.
    """
    chosen = [i for i in names if unit_hash(HELD_OUT_CONCEPTS, i) < _CONCEPT_SHARE]
    return frozenset(
        concept_id
        for concept_id in chosen
        if not any(
            names_in(text, [names[concept_id]])
            for other, text in names.items()
            if other != concept_id
        )
    )


def names_in(text: str, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that stand in a text as whole words, in singular or plural."""
    return [name for name in names if _name_pattern(name).search(text)]


def split_of(concept_id: str, styles: Sequence[str], held_out: bool) -> dict[str, str]:
    """Assigns each style of one concept to a split: style -> split.

    At least two styles of a trained concept stay in `train`, however few there are.

    Args:
      concept_id: the slug of its name.
      styles: those in which it is drawn, keys of `words.ALL_STYLES`, in any order.
      held_out: whether the concept is among `held_out_concepts`.
    """
    splits = {s: HELD_OUT_STYLES for s in styles if s in words.EVALUATION_STYLES}
    trainable = [s for s in styles if s not in splits]
    if held_out:
        return splits | dict.fromkeys(trainable, HELD_OUT_CONCEPTS)
    splits |= dict.fromkeys(trainable, TRAIN)
    # Held-out pairs choose first, so that adding a validation split did not move them. The order by
    # hash, not by style, makes the choice independent of which styles there are.
    spare = len(trainable) - _STYLES_LEFT_IN_TRAIN
    for split, share in ((HELD_OUT_PAIRS, _PAIR_SHARE), (VALIDATION, _VALIDATION_SHARE)):
        for u, style in sorted((unit_hash(split, concept_id, s), s) for s in trainable):
            if u < share and splits[style] == TRAIN and spare > 0:
                splits[style] = split
                spare -= 1
    return splits


def held_out_backgrounds(concept_id: str, style: str, backgrounds: Sequence[str]) -> list[str]:
    """Returns those of `backgrounds` on which a trained pair is held out; never white."""
    return [
        color
        for color in backgrounds
        if color != attributes.WHITE
        and unit_hash(HELD_OUT_TRIPLES, concept_id, style, color) < _TRIPLE_SHARE
    ]


@functools.cache
def _name_pattern(name: str) -> re.Pattern[str]:
    # Stripping one s from a name, and allowing s or es after it, finds "shopping bags" in "a
    # shopping bag" and "box" in "boxes". Irregular plurals are not found.
    singular = re.sub(r"(?<=[^s])s$", "", name)
    return re.compile(rf"(?<![a-z0-9]){re.escape(singular)}(s|es)?(?![a-z0-9])")
