"""Words of the emoji set: style names, articles and captions.

Every caption but the plain ones names the concept and the style. Caption 0 is the canonical one,
used for evaluation and examples: `caption("red apple", "fluent-emoji-flat")` is "a flat emoji of a
red apple". Plain captions ("a red apple") name no style: they teach what most people type.
A caption that names no background means a white one; words for other backgrounds and for mirrored
images are added by `dalle2_jax.data.attributes`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from dalle2_jax.data import attributes


@dataclasses.dataclass(frozen=True)
class Style:
    """`noun` opens "<noun> of a red apple"; `short` stands in "red apple, <short> style"."""

    noun: str
    short: str


# The styles that a model may be trained on.
STYLES: dict[str, Style] = {
    "noto": Style("a noto emoji", "noto"),
    "noto-v1": Style("an old noto emoji", "old noto"),
    "twemoji": Style("a twemoji", "twemoji"),
    "fluent-emoji": Style("a glossy 3d emoji", "glossy 3d"),
    "fluent-emoji-flat": Style("a flat emoji", "flat"),
    "fluent-emoji-high-contrast": Style("a black and white emoji", "black and white"),
    "emojione": Style("an emojione emoji", "emojione"),
    "emojione-monotone": Style("a monotone emoji", "monotone"),
    "fxemoji": Style("a firefox emoji", "firefox"),
    "streamline-emojis": Style("a streamline emoji", "streamline"),
}
# Share-alike sets, whose licence would pass to what is derived from them. They serve to evaluate on
# a style that no training image shows.
EVALUATION_STYLES: dict[str, Style] = {
    "openmoji": Style("an openmoji", "openmoji"),
    "emojione-v1": Style("an old emojione emoji", "old emojione"),
}
ALL_STYLES = STYLES | EVALUATION_STYLES

# {noun}, {short}: the style's words; {c}: the name with its article; {n}: the bare name.
TEMPLATES: tuple[str, ...] = (
    "{noun} of {c}",
    "{n}, {short} style",
    "{c} in {short} style",
    "{n} emoji, {short} style",
    "{short} style {n}",
    "a picture of {c} in {short} style",
    "{n}, {tag}, {short} style",
    "{noun} of {c}, {tag}",
    "{c} as {noun}",
    "{short} {n} emoji",
    "{noun} showing {c}",
    "an icon of {c}, {short}",
)
PLAIN_TEMPLATES: tuple[str, ...] = ("{c}", "an emoji of {c}")
NUM_TEMPLATES = len(TEMPLATES)
MAX_KEYWORD_CAPTIONS = 4

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
    """A fixed number in [0, 1), uniform over names: the first 64 bits of their sha256."""
    digest = hashlib.sha256("\x1f".join(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def with_article(name: str) -> str:
    """`a red apple`, `an owl`, `the sun`, `grapes`: by rules of thumb, good enough for captions."""
    if name in _THE:
        return f"the {name}"
    # The head noun decides: "glass of milk" is a glass, "people holding hands" are people.
    head = _HEAD_ENDS.split(name, maxsplit=1)[0].split()[-1]
    plural = (
        head.endswith("s") and not head.endswith(("ss", "'s")) and head not in _PLURAL_NOT
    ) or head in _PLURALS
    if plural or head in _NO_ARTICLE or name.startswith(("no ", "mount ", "see ")):
        return name
    # Sounds, not letters: an hour, a unicorn, an 8 ball.
    first = name.split()[0]
    silent = re.match(r"(hour|honest|heir|x-ray|x ray)", first) is not None
    voiced_u = re.match(r"(uni|use|uti|ewe|euro|one|u-|ufo|ukulele)", first) is not None
    vowel = first[0] in "aeiou" or first[0] == "8"
    return f"{'an' if (vowel or silent) and not voiced_u else 'a'} {name}"


def caption(
    concept: str,
    style: str,
    template_index: int = 0,
    tag: str = "",
    background: str = attributes.WHITE,
) -> str:
    """Returns one caption of a concept in a style.

    Args:
      concept: its name in lower case, such as "red apple".
      style: a key of ALL_STYLES.
      template_index: of TEMPLATES; 0 is the canonical caption.
      tag: the keyword of templates 6 and 7; without one they say "emoji".
      background: a colour of `attributes.COLORS`; any but white is named at the end.
    """
    style_words = ALL_STYLES[style]
    text = TEMPLATES[template_index].format(
        noun=style_words.noun,
        short=style_words.short,
        n=concept,
        c=with_article(concept),
        tag=tag or "emoji",
    )
    return attributes.name_background(text, background)


def captions(concept: str, style: str, tags: Sequence[str] = ()) -> list[str]:
    """Returns every caption of a drawing; the canonical one comes first.

    They are all templates without a keyword, the plain ones, and up to MAX_KEYWORD_CAPTIONS with
    keywords. Which keywords is fixed by a hash of concept and style, so that the styles of one
    concept share the whole list between them. Keywords that repeat a word of the name are left out.

    Args:
      concept: its name in lower case.
      style: a key of ALL_STYLES.
      tags: the concept's keywords, in any order.
    """
    styled = [i for i, template in enumerate(TEMPLATES) if "{tag}" not in template]
    tagged = [i for i in range(NUM_TEMPLATES) if i not in styled]
    name_words = set(re.findall(r"[a-z0-9]+", concept))
    keywords = [tag for tag in tags if not set(re.findall(r"[a-z0-9]+", tag)) & name_words]
    # Each style of a concept starts elsewhere in the list, so the styles together use more of it.
    keywords.sort(key=lambda tag: unit_hash("tag", concept, style, tag))
    texts = [caption(concept, style, i) for i in styled]
    for k, keyword in enumerate(keywords[:MAX_KEYWORD_CAPTIONS]):
        texts.append(caption(concept, style, tagged[k % len(tagged)], keyword))
    plain = [t.format(c=with_article(concept)) for t in PLAIN_TEMPLATES]
    # Without repetitions: the pipeline picks captions uniformly.
    return list(dict.fromkeys(texts + plain))
