"""Concepts of the emoji set: each emoji's name, group and keywords, and its drawing in every style.

Names, groups and keywords are emojibase's. A drawing is found

    by code point         in the sets that have them,
    else by name          first every emoji's own name, then other names of it: aliases in the sets
                          with code points, Unicode's name, shortcodes of common chats,
    but for exceptions    `icon_names.EXCEPTIONS`, found by eye.

A drawing belongs to one concept only. Concepts that fewer than four trainable styles draw are left
out, as are flags, keycaps and skin tones.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle2_jax.data.emoji import npm
from dalle2_jax.data.emoji.icon_names import EXCEPTIONS
from dalle2_jax.data.emoji.icon_sets import IconSet, load_sets
from dalle2_jax.data.emoji.words import ALL_STYLES, STYLES

EMOJIBASE = npm.Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
# Presets of names such as `:dog:`, from the most widely used to the least: the first match counts.
_SHORTCODES = ("github", "iamcal", "joypixels", "emojibase", "emojibase-legacy")
# With fewer there would be no pair to spare: two styles stay in train, and others are held out.
_MIN_STYLES = 4

_DROPPED_GROUPS = frozenset(["component", "flags"])
# Concrete concepts are the easy part of the set, which `subset=concrete` keeps: things rather than
# signs, or people in a hundred occupations.
_CONCRETE_GROUPS = frozenset(
    ["smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"]
)
_ABSTRACT_SUBGROUPS = frozenset(["emotion", "place-map", "lock", "mail", "money"])
# Signs rather than things, and names that differ from a neighbour's by a detail too small at 64 px.
_ABSTRACT = re.compile(
    r"o'clock|-thirty$|^oncoming |^(chart|bar chart|speaker|muted) |^bell with slash|"
    r"^(new|waxing|waning|first|last|full).*moon face|(spade|heart|diamond|club) suit|"
    r"^sun behind|^(love hotel|department store|convenience store|japanese post office|placard)$|"
    r"^(stop sign|construction|card index|identification card|information|label|receipt)|"
    r"^(mobile phone with arrow|low battery|page |notebook|bookmark|spiral |round pushpin)|"
    r"^(orange|green|blue|closed) book|^heart (decoration|exclamation)|^(grey|light blue) heart|"
    r"^(umbrella (on|with)|closed umbrella|snowman without)|^(locomotive|railway|light rail)|"
    r"^station|"
    r"^(2nd|3rd) place|magnifying glass tilted right|^(musical (score|notes)|level|control)|"
    r"^(linked paper|file folder|open file|nazar|hamsa|mahjong|flower playing)|head shaking|"
    r"^(kissing face with|smiling face with open|slightly |cloud with|admission|goal net)"
)

# What would be wrong in a mirror: it shows text, numbers, a time, a map, or its name says a side.
_DIRECTED_GROUPS = frozenset(["symbols"])
_DIRECTED_SUBGROUPS = frozenset(
    "emotion time music book-paper writing mail money office place-map award-medal game "
    "hotel computer".split()
)
_DIRECTED = re.compile(
    r"\d|\b(left|right|facing|tilted|turned|reverse|arrow|arrows|clockwise|horizontally|"
    r"waxing|waning|quarter|crescent|clock|watch|timer|hourglass|calendar|map|globe|chart|"
    r"text|symbols?|letters?|numbers?|sign|button|badge|label|input|japanese|flag|name|"
    r"store|hotel|hospital|bank|office|ambulance|police|taxi|bus|fuel|ticket|tickets|"
    r"receipt|scroll|musical|note|notes|money-mouth|clapper|placard|card|stop|ufo|"
    r"zzz|ok|hundred|soon|back|end|top)\b"
)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One emoji in one style: `svg` is a complete square document, `source` is
    `package@version:icon`, `license` an SPDX identifier."""

    style: str
    svg: str
    source: str
    license: str


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
      id: a slug of its name.
      name: in lower case, as captions use it.
      group: emojibase's, such as "animals-nature".
      concrete: whether it is a thing that 64 px tell apart from similar ones.
      has_direction: whether a mirror image would contradict the name or show mirrored text.
      tags: keywords, in lower case.
      drawings: style -> drawing, for each style that has one.
    """

    id: str
    name: str
    group: str
    concrete: bool
    has_direction: bool
    tags: tuple[str, ...]
    drawings: Mapping[str, Drawing]


@dataclasses.dataclass(frozen=True)
class Emojibase:
    """Names, groups and keywords of all emoji, by emojibase.

    Attributes:
      entries: one dict an emoji (`label`, `hexcode`, `order`, `group`, `subgroup`, `tags`).
      groups: `groups` and `subgroups`, both number as text -> name.
      other_names: hexcode -> Unicode's name and shortcodes.
    """

    entries: Sequence[Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, str]]
    other_names: Mapping[str, Sequence[str]]

    @classmethod
    def load(cls, cache: pathlib.Path | None = None) -> Emojibase:
        """Fetches emojibase. Raises UserError, see `npm.fetch`."""
        tarball = npm.fetch(EMOJIBASE, cache)
        unicode_names = npm.read_json(tarball, "meta/unicode-names.json")
        names = {code: [name] for code, name in unicode_names.items()}
        for preset in _SHORTCODES:
            shortcodes = npm.read_json(tarball, f"en/shortcodes/{preset}.json")
            for code, value in shortcodes.items():
                names.setdefault(code, []).extend([value] if isinstance(value, str) else value)
        return cls(
            entries=npm.read_json(tarball, "en/data.json"),
            groups=npm.read_json(tarball, "meta/groups.json"),
            other_names=names,
        )


def load_concepts(cache: pathlib.Path | None = None) -> list[Concept]:
    """Fetches the sets and joins them: every concept that four trainable styles show, in
    emojibase's order.

    Raises:
      UserError: a package cannot be fetched (see `npm.fetch`).
    """
    return list(join(Emojibase.load(cache), load_sets(cache)))


def clean_name(label: str) -> str:
    """`family: man, woman` -> `family man woman`; lower case, no quotes, no brackets."""
    text = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    if "\u2019" in label:
        text = label.replace("\u2019", "'").encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9' -]+", " ", text).split())


def join(base: Emojibase, sets: Mapping[str, IconSet]) -> Iterator[Concept]:
    """Yields the concepts in emojibase's order; `sets` are by style."""
    entries = _entries(base)
    styles = [style for style in ALL_STYLES if style in sets]
    icons = {style: _icons(style, sets, entries, base.other_names) for style in styles}
    used_drawings: set[tuple[str, str]] = set()
    for concept_id, entry in entries.items():
        drawings = {}
        for style in styles:
            icon = icons[style].get(concept_id)
            svg = sets[style].svg(icon) if icon else None
            # Some sets draw several concepts alike (man, person running): the first keeps the
            # drawing, or a held-out one could be seen in training under another name.
            if svg is not None and (style, svg) not in used_drawings:
                source = f"{sets[style].pin}:{icon}"
                drawings[style] = Drawing(style, svg, source, sets[style].license)
        if len(drawings.keys() & STYLES.keys()) < _MIN_STYLES:
            continue
        used_drawings |= {(style, drawing.svg) for style, drawing in drawings.items()}
        name = clean_name(entry["label"])
        group = base.groups["groups"][str(entry["group"])]
        subgroup = base.groups["subgroups"].get(str(entry.get("subgroup")), "")
        yield Concept(
            id=concept_id,
            name=name,
            group=group,
            concrete=group in _CONCRETE_GROUPS
            and subgroup not in _ABSTRACT_SUBGROUPS
            and not _ABSTRACT.search(name),
            has_direction=group in _DIRECTED_GROUPS
            or subgroup in _DIRECTED_SUBGROUPS
            or _DIRECTED.search(name) is not None,
            tags=tuple(t for t in map(str.lower, entry.get("tags", ())) if _is_keyword(t)),
            drawings=drawings,
        )


def _entries(base: Emojibase) -> dict[str, Mapping[str, Any]]:
    """Concept id -> entry, without what is dropped, in order; the first of equal names counts."""
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in sorted(base.entries, key=lambda e: e.get("order", 0)):
        group = base.groups["groups"].get(str(entry.get("group")))
        name = clean_name(entry["label"])
        if group is not None and group not in _DROPPED_GROUPS and not name.startswith("keycap"):
            entries.setdefault(_slug(name), entry)
    return entries


def _icons(
    style: str,
    sets: Mapping[str, IconSet],
    entries: Mapping[str, Mapping[str, Any]],
    other_names: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Concept id -> icon name in one style."""
    exceptions = {_slug(name): icon for name, icon in EXCEPTIONS.get(style, {}).items()}
    icons: dict[str, str] = {}
    # Code points are unambiguous: sets that have them need no names.
    if sets[style].code_points:
        for concept_id, entry in entries.items():
            icon = sets[style].by_code_point(entry["hexcode"].lower())
            if icon and concept_id not in exceptions:
                icons[concept_id] = icon
        return icons
    icons = {concept_id: icon for concept_id, icon in exceptions.items() if icon}
    # Name without hyphens -> icon. Of several drawings "pizza-1" and "pizza-2" the first stands for
    # "pizza", unless an icon has just that name. In reverse order the first is written last, and
    # exact names are written after all of them.
    by_name = {}
    for icon in sorted(sets[style].names, reverse=True):
        by_name[_joined(re.sub(r"-\d$", "", icon))] = icon
    by_name |= {_joined(icon): icon for icon in sets[style].names}
    used_icons = set(icons.values())
    # Two passes. In the first every emoji claims the icon of its own name. Only then do other names
    # count, because "dog" is also an alias of the dog face, which precedes the dog.
    for names_of in (lambda i: [i], lambda i: _other_names(entries[i], sets, other_names)):
        for concept_id in entries:
            if concept_id in icons or concept_id in exceptions:
                continue
            matches = (by_name.get(_joined(name)) for name in names_of(concept_id))
            icon = next((icon for icon in matches if icon and icon not in used_icons), None)
            if icon:
                icons[concept_id] = icon
                used_icons.add(icon)
    return icons


def _other_names(
    entry: Mapping[str, Any],
    sets: Mapping[str, IconSet],
    other_names: Mapping[str, Sequence[str]],
) -> list[str]:
    """Other names of an emoji, as slugs; the more trustworthy ones come first."""
    names = []
    for icon_set in sets.values():
        if icon := icon_set.by_code_point(entry["hexcode"].lower()):
            names += [icon, *icon_set.aliases_of(icon)]
    code = entry["hexcode"]
    names += other_names.get(code, other_names.get(code.replace("-FE0F", ""), ()))
    return [_slug(name) for name in names]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


def _joined(slug: str) -> str:
    """`alarm-clock` -> `alarmclock`, as fxemoji writes its names."""
    return slug.replace("-", "")


def _is_keyword(tag: str) -> bool:
    """Whether a tag is at most two words of letters: emojibase also lists `:)` and `XD`."""
    return re.fullmatch(r"[a-z]{3,}( [a-z]{2,})?", tag) is not None
