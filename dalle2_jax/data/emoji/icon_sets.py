"""Six emoji sets as SVG, joined by code point to emojibase's names, groups and keywords.

Iconify's `chars.json` maps code points to icon names for four of the six sets; the other two share
their names with a sibling (Fluent's three variants, Noto's two generations).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from dalle2_jax.data.emoji import npm
from dalle2_jax.data.emoji.words import STYLES

PACKAGES: dict[str, npm.Package] = {
    "noto": npm.Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": npm.Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "twemoji": npm.Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent-emoji": npm.Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "fluent-emoji-flat": npm.Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent-emoji-high-contrast": npm.Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
}
EMOJIBASE = npm.Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
# A set without code points of its own borrows those of the set it shares icon names with.
_CODE_POINTS_OF = {"fluent-emoji": "fluent-emoji-flat", "noto-v1": "noto"}

_DROPPED_GROUPS = frozenset(["component", "flags"])
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
_TOO_FEW_STYLES = 4
# Noto's first generation names the game what the second names the insect.
_MISNAMED = frozenset([("noto-v1", "cricket")])


@dataclasses.dataclass(frozen=True)
class Picture:
    """One drawing: `svg` is a whole square document, `source` reads `package@version:icon`."""

    style: str
    svg: str
    source: str
    license: str


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji. `id` is a slug of its name; `pictures` maps each style that draws it."""

    id: str
    name: str
    group: str
    concrete: bool
    tags: tuple[str, ...]
    pictures: Mapping[str, Picture]


def load_concepts(cache: pathlib.Path | None = None) -> list[Concept]:
    """Every concept that a set draws, without flags, keycaps and skin tones, in emojibase's order.

    Raises:
      UserError: a package cannot be fetched (see `npm.fetch`).
    """
    base = npm.fetch(EMOJIBASE, cache)
    groups = npm.read_json(base, "meta/groups.json")
    sets = {style: _read_set(npm.fetch(p, cache)) for style, p in PACKAGES.items()}
    return list(_join(npm.read_json(base, "en/data.json"), groups, sets))


def clean_name(label: str) -> str:
    """`family: man, woman` -> `family man woman`; lower case, no quotes, no brackets."""
    text = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    if "\u2019" in label:
        text = label.replace("\u2019", "'").encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9' -]+", " ", text).split())


def _join(
    emoji: list[dict[str, Any]], groups: dict[str, Any], sets: Mapping[str, Mapping[str, Any]]
) -> Iterator[Concept]:
    seen: set[str] = set()
    drawn: set[tuple[str, str]] = set()
    for entry in sorted(emoji, key=lambda e: e.get("order", 0)):
        group = groups["groups"].get(str(entry.get("group")))
        name = clean_name(entry["label"])
        if group is None or group in _DROPPED_GROUPS or name.startswith("keycap"):
            continue
        concept_id = re.sub(r"[^a-z0-9]+", "-", name.replace("'", "")).strip("-")
        if concept_id in seen:
            continue
        pictures = {}
        for style in STYLES:
            chars = sets[_CODE_POINTS_OF.get(style, style)]["chars"]
            code = entry["hexcode"].lower()
            icon = chars.get(code) or chars.get(code.replace("-fe0f", ""))
            svg = _svg(sets[style]["icons"], icon) if icon else None
            # Some sets draw several concepts alike (man, person running): the first keeps the
            # drawing, or a held-out one could be seen in training under another name.
            if svg is not None and (style, svg) not in drawn and (style, icon) not in _MISNAMED:
                drawn.add((style, svg))
                pin, spdx = PACKAGES[style].pin, sets[style]["license"]
                pictures[style] = Picture(style, svg, f"{pin}:{icon}", spdx)
        if not pictures:
            continue
        seen.add(concept_id)
        concrete = (
            group in _CONCRETE_GROUPS
            and groups["subgroups"].get(str(entry.get("subgroup"))) not in _ABSTRACT_SUBGROUPS
            and not _ABSTRACT.search(name)
            and len(pictures) >= _TOO_FEW_STYLES
        )
        tags = tuple(t for t in map(str.lower, entry.get("tags", ())) if _is_keyword(t))
        yield Concept(concept_id, name, group, concrete, tags, pictures)


def _is_keyword(tag: str) -> bool:
    """Two words at most, of letters: emojibase also lists smileys such as `:)` and `XD`."""
    return re.fullmatch(r"[a-z]{3,}( [a-z]{2,})?", tag) is not None


def _read_set(tarball: pathlib.Path) -> dict[str, Any]:
    return {
        "icons": npm.read_json(tarball, "icons.json"),
        "chars": npm.read_json(tarball, "chars.json"),
        "license": npm.read_json(tarball, "info.json")["license"]["spdx"],
    }


def _svg(icons: Mapping[str, Any], name: str) -> str | None:
    """The icon as a square document with the drawing centred; None where the set lacks it."""
    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"].get(alias["parent"] if alias else name)
    if icon is None:
        return None
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    left, top = (icon.get(k, icons.get(k, 0)) for k in ("left", "top"))
    body = icon["body"]
    if alias and alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if alias and alias.get("vFlip"):
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{box}">{body}</svg>'
    )
