"""Records of the emoji set, all but their pixels: split, captions, backgrounds, mirroring.

Every drawing is rendered once at 64 px to see which backgrounds show it, whether a mirror image
differs, and whether another record shows the same. What follows from that, the splits included, is
therefore the same at every size that the set is built at, and whatever `subset` is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle2_jax.data import attributes
from dalle2_jax.data.emoji import render, splits, words
from dalle2_jax.data.emoji.concepts import Concept, Drawing

_ANALYSIS_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of one split.

    Attributes:
      split: of splits.SPLITS.
      drawing: what is to be rendered, on `features["background"]` unless that is white.
      features: every feature but `image`.
    """

    split: str
    drawing: Drawing
    features: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A name that no other record of the split has."""
        names = (self.features[k] for k in ("concept_id", "style", "background"))
        return "/".join(names)


@dataclasses.dataclass
class _Member:
    """A drawing with what its pixels allow."""

    concept: Concept
    tags: Sequence[str]
    captions: Sequence[str]
    style: str
    split: str
    backgrounds: list[str]
    mirrorable: bool


def make_records(concepts: Sequence[Concept]) -> list[Record]:
    """Returns the records of every split, in the order of splits.SPLITS and of the concepts.

    What `train` shows, also under another name or in a mirror, is left out of every other split;
    what `validation` shows, out of the held-out ones (see `render.near_duplicates`). In black and
    white, for instance, the large orange diamond is the large blue one.
    """
    # 1. Look at every drawing, and assign each pair to a split by the hash of its names.
    members, prints = _analyse(concepts)
    rows: dict[str, list[int]] = {split: [] for split in splits.SPLITS}
    for row, member in enumerate(members):
        rows[member.split].append(row)
    # 2. Take the held-out backgrounds away from every trained pair, before step 3 asks which
    # backgrounds the other trained pairs still have.
    triples: dict[int, list[str]] = {}
    for row in rows[splits.TRAIN]:
        member = members[row]
        names = (member.concept.id, member.style)
        if colors := splits.held_out_backgrounds(*names, member.backgrounds):
            triples[row] = colors
            member.backgrounds = [c for c in member.backgrounds if c not in colors]
    # 3. Write the splits in order. `shown` grows to what no later split may show: train is left as
    # it is, validation must not repeat train, and held-out splits must repeat neither.
    records = []
    shown = rows[splits.TRAIN]
    for split in splits.SPLITS:
        if split == splits.HELD_OUT_TRIPLES:
            records += _triples(members, prints, triples, rows[splits.TRAIN])
            continue
        split_rows = rows[split]
        if split != splits.TRAIN and split_rows:
            near = render.near_duplicates(prints[split_rows], prints[shown])
            split_rows = [r for r, images in zip(split_rows, near, strict=True) if not images.any()]
        if split == splits.VALIDATION:
            shown = shown + split_rows
        records += [_record(members[row]) for row in split_rows]
    return records


def matches(record: Record, terms: Mapping[str, tuple[str, ...] | None]) -> bool:
    """Whether a record is one that a subset keeps; `terms` are of `tfds_folder.parse_subset`."""
    return all(
        record.features[feature] if values is None else record.features[feature] in values
        for feature, values in terms.items()
    )


def _analyse(concepts: Sequence[Concept]) -> tuple[list[_Member], np.ndarray]:
    """Renders every drawing small: members and their fingerprints, float32 [n, 32, 32, 3]."""
    names = {concept.id: concept.name for concept in concepts}
    held_out = splits.held_out_concepts(names)
    members, drawings = [], []
    for concept in concepts:
        others = [names[i] for i in held_out if i != concept.id]
        tags = [tag for tag in concept.tags if not splits.names_in(tag, others)]
        split_of = splits.split_of(concept.id, list(concept.drawings), concept.id in held_out)
        for style, drawing in concept.drawings.items():
            image = render.render(drawing.svg, _ANALYSIS_SIZE)
            drawings.append(image)
            captions = words.captions(concept.name, style, tags)
            # "black and white style flower playing cards" names a white flower.
            captions = [text for text in captions if not splits.names_in(text, others)]
            members.append(
                _Member(
                    concept=concept,
                    tags=tags,
                    captions=captions,
                    style=style,
                    split=split_of[style],
                    backgrounds=render.visible_backgrounds(image),
                    mirrorable=not concept.has_direction and render.changes_in_mirror(image),
                )
            )
    return members, render.fingerprints(np.stack(drawings))


def _triples(
    members: Sequence[_Member],
    prints: np.ndarray,
    triples: Mapping[int, list[str]],
    train: Sequence[int],
) -> list[Record]:
    """The held-out triples, but for those whose image another trained pair may show."""
    if not triples:
        return []
    near = render.near_duplicates(prints[list(triples)], prints[list(train)])
    records = []
    for (row, colors), is_near in zip(triples.items(), near, strict=True):
        # Another trained pair that looks the same, such as the woman beside the man, gives the
        # triple away if it is trained on that background.
        twins = [train[i] for i in np.flatnonzero(is_near).tolist() if train[i] != row]
        trained_on = {color for twin in twins for color in members[twin].backgrounds}
        records += [_triple(members[row], color) for color in colors if color not in trained_on]
    return records


def _record(member: _Member) -> Record:
    features = {
        "captions": member.captions,
        "background": attributes.WHITE,
        "backgrounds": member.backgrounds,
        "mirrorable": member.mirrorable,
    }
    return Record(member.split, member.concept.drawings[member.style], features | _names(member))


def _triple(member: _Member, color: str) -> Record:
    """The record of a background on which a trained pair is held out."""
    wordings = len(attributes.BACKGROUND_WORDINGS)
    features = {
        "captions": [
            attributes.name_background(text, color, i % wordings)
            for i, text in enumerate(member.captions)
        ],
        "background": color,
        "backgrounds": [],
        "mirrorable": False,
    }
    drawing = member.concept.drawings[member.style]
    return Record(splits.HELD_OUT_TRIPLES, drawing, features | _names(member))


def _names(member: _Member) -> dict[str, Any]:
    """The features of a record that do not depend on its background."""
    drawing = member.concept.drawings[member.style]
    return {
        "concept": member.concept.name,
        "concept_id": member.concept.id,
        "style": member.style,
        "group": member.concept.group,
        "concrete": member.concept.concrete,
        "tags": list(member.tags),
        "license": drawing.license,
        "source": drawing.source,
    }
