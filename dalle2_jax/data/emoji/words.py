"""Words and splits of the emoji set: style names, captions, what is held out. Needs no library.

A caption always holds the concept's full name and words that name the style. Caption 0 of a style
is the canonical one, for evaluation and examples: `caption("red apple", "fluent-emoji-flat")`.
Splits depend on sha256 of names alone, so they survive other orders and other package versions;
`emoji_builder` then leaves out held-out pictures that equal a training one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Style:
    """`noun` opens "<noun> of a red apple"; `short` stands in "red apple, <short> style"."""

    noun: str
    short: str


STYLES: dict[str, Style] = {
    "noto": Style("a noto emoji", "noto"),
    "noto-v1": Style("an old noto emoji", "old noto"),
    "twemoji": Style("a twemoji", "twemoji"),
    "fluent-emoji": Style("a glossy 3d emoji", "glossy 3d"),
    "fluent-emoji-flat": Style("a flat emoji", "flat"),
    "fluent-emoji-high-contrast": Style("a black and white emoji", "black and white"),
}

# {noun}, {short}: the style's words; {c}: the name with its article; {n}: the bare name
TEMPLATES: tuple[str, ...] = (
    "{noun} of {c}",
    "{n}, {short} style",
    "{c} in {short} style",
    "{n} emoji, {short} style",
    "{short} style {n}",
    "a picture of {c} in {short} style",
    "{n}, {tag}, {short} style",
    "{noun} of {c}, {tag}",
)
NUM_TEMPLATES = len(TEMPLATES)
CAPTIONS_PER_PICTURE = 8

HELD_OUT_CONCEPTS = 0.02
HELD_OUT_PAIRS = 0.10
_STYLES_LEFT_IN_TRAIN = 2

# Mass nouns, and activities in -ing that take no article; matched on the name's head noun.
_NO_ARTICLE = frozenset(
    "bread bacon butter salt garlic broccoli rice spaghetti oden sushi milk sake mate ice "
    "popcorn wood fog fire luggage confetti soap yarn thread dna tennis baseball softball "
    "basketball volleyball football lacrosse badminton bowling hockey cooking camping food poo "
    "meat ginger paper mail fuji water jewelry coral glitter asia-australia europe-africa "
    "americas japan money polo handball curry custard fondue foggy construction laughing "
    "voltage pong clothing".split()
)
_PLURAL_NOT = frozenset(
    "bus minibus trolleybus cactus octopus rhinoceros hippopotamus walrus compass glass lotus "
    "hibiscus tennis iris cross dress abacus asparagus virus cutlass walrus kiss circus "
    "mattress lens swiss platypus ophiuchus pisces aries taurus".split()
)
_PLURALS = frozenset(["people", "men", "women", "children", "teeth", "dice", "mice"])
_THE = frozenset(["tokyo tower", "statue of liberty", "milky way", "kaaba", "sun"])
_HEAD_ENDS = re.compile(
    r" (with|of|in|on|and|without|behind|by|showing|over|holding|facing|at|from|savoring|blowing|"
    r"screaming) "
)


def unit_hash(*names: str) -> float:
    """A fixed number in [0, 1) drawn from sha256 of the names."""
    digest = hashlib.sha256("\x1f".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_article(name: str) -> str:
    """`a red apple`, `an owl`, `the sun`, `grapes`: by rules of thumb, good enough for captions."""
    if name in _THE:
        return f"the {name}"
    head = _HEAD_ENDS.split(name, maxsplit=1)[0].split()[-1]
    plural = (
        head.endswith("s") and not head.endswith(("ss", "'s")) and head not in _PLURAL_NOT
    ) or head in _PLURALS
    if plural or head in _NO_ARTICLE or name.startswith(("no ", "mount ", "see ")):
        return name
    first = name.split()[0]
    silent = re.match(r"(hour|honest|heir|x-ray|x ray)", first) is not None
    voiced_u = re.match(r"(uni|use|uti|ewe|euro|one|u-|ufo|ukulele)", first) is not None
    vowel = first[0] in "aeiou" or first[0] == "8"
    return f"{'an' if (vowel or silent) and not voiced_u else 'a'} {name}"


def caption(concept: str, style: str, template_index: int = 0, tag: str = "") -> str:
    """One caption of `concept` (its name, lower case) in `style` (a key of STYLES).

    Templates 6 and 7 set a keyword beside the name; without `tag` they repeat "emoji".
    """
    words = STYLES[style]
    return TEMPLATES[template_index].format(
        noun=words.noun, short=words.short, n=concept, c=with_article(concept), tag=tag or "emoji"
    )


def captions(concept: str, style: str, tags: Sequence[str] = ()) -> list[str]:
    """CAPTIONS_PER_PICTURE captions: all templates without a keyword, the rest with drawn ones.

    The canonical caption comes first. The keywords are drawn by a hash of concept and style.
    """
    plain = [i for i, t in enumerate(TEMPLATES) if "{tag}" not in t]
    tagged = [i for i in range(NUM_TEMPLATES) if i not in plain]
    own = set(re.findall(r"[a-z0-9]+", concept))
    useful = [t for t in tags if not set(re.findall(r"[a-z0-9]+", t)) & own]
    drawn = sorted(useful, key=lambda t: unit_hash("tag", concept, style, t))
    out = [caption(concept, style, i) for i in plain]
    for k in range(CAPTIONS_PER_PICTURE - len(plain)):
        if drawn:
            out.append(caption(concept, style, tagged[k % len(tagged)], drawn[k % len(drawn)]))
        else:
            out.append(out[k % len(plain)])
    return out


def split_of(concept_id: str, styles: Sequence[str]) -> dict[str, str]:
    """style -> split for one concept drawn in `styles`.

    2 % of concepts are `held_out_concepts` in all their styles. Of the others 10 % of pairs are
    `held_out_pairs`, while at least two styles of the concept stay in `train`.

    What is held out is the pictures, not the words. Seven held-out concepts (crab, drum, egg, herb,
    microphone, mountain, tongue) are also keywords of training pictures, and five of them stand so
    in training captions: "a noto emoji of a hatching chick, egg".
    """
    if unit_hash("held_out_concepts", concept_id) < HELD_OUT_CONCEPTS:
        return dict.fromkeys(styles, "held_out_concepts")
    splits = dict.fromkeys(styles, "train")
    ranked = sorted((unit_hash("held_out_pairs", concept_id, s), s) for s in styles)
    for u, style in ranked[: max(0, len(ranked) - _STYLES_LEFT_IN_TRAIN)]:
        if u < HELD_OUT_PAIRS:
            splits[style] = "held_out_pairs"
    return splits
