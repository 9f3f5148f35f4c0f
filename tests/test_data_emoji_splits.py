"""Splits of the emoji set do not leak: neither images, nor names, nor near copies."""

import itertools
import pathlib

import numpy as np
import pytest

from dalle2_jax.data import attributes
from dalle2_jax.data.emoji import records, render, splits, words
from dalle2_jax.data.emoji.concepts import Concept, Drawing
from dalle2_jax.data.sources import tfds_folder

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "emoji_attributes"
STYLES = list(words.STYLES)
PINNED_OWL = {"twemoji": ["yellow"], "fluent-emoji-high-contrast": ["black"]}
PINNED_APPLE = dict.fromkeys(
    ["fluent-emoji", "fluent-emoji-high-contrast", "streamline-emojis"], splits.HELD_OUT_PAIRS
)
# No evaluation styles: a repository under another licence had better not hold share-alike images.
FIXTURE_SPLITS = [split for split in splits.SPLITS if split != splits.HELD_OUT_STYLES]


def concept(name, color, tags=(), styles=STYLES, side=8):
    """A concept drawn as a square off the centre, a pixel smaller in each further style."""
    drawings = {}
    for i, style in enumerate(styles):
        square = f'<rect x="1" y="1" width="{side - 0.3 * i}" height="{side}" fill="{color}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{square}</svg>'
        drawings[style] = Drawing(style, svg, f"{style}:{name}", "MIT")
    concept_id = name.replace(" ", "-")
    return Concept(concept_id, name, "objects", True, False, tuple(tags), drawings)


def captions_of(made, *names):
    return [text for r in made if r.split in names for text in r.features["captions"]]


def test_splits_do_not_leak_and_have_the_stated_shares():
    ids = [f"concept-{i}" for i in range(4000)]
    held_out = splits.held_out_concepts({i: i for i in ids})
    by_concept = {i: splits.split_of(i, list(words.ALL_STYLES), i in held_out) for i in ids}
    for concept_id, by_style in by_concept.items():
        for style, split in by_style.items():
            is_evaluation = style in words.EVALUATION_STYLES
            assert (split == splits.HELD_OUT_STYLES) == is_evaluation
            if not is_evaluation:  # a concept is held out in all its styles or in none
                assert (split == splits.HELD_OUT_CONCEPTS) == (concept_id in held_out)
    flat = [s for by_style in by_concept.values() for s in by_style.values()]
    count = 4000 * len(STYLES)
    assert flat.count(splits.HELD_OUT_CONCEPTS) / count == pytest.approx(0.02, abs=0.007)
    assert flat.count(splits.HELD_OUT_PAIRS) / count == pytest.approx(0.098, abs=0.01)
    assert flat.count(splits.VALIDATION) / count == pytest.approx(0.044, abs=0.01)


def test_splits_are_a_function_of_names_alone():
    for i in range(50):
        assert splits.split_of(f"c{i}", STYLES, False) == splits.split_of(
            f"c{i}", STYLES[::-1], False
        )
    # Pinned: these may not move, or trained weights would have seen what is held out.
    names = {"guitar": "guitar", "fox": "fox", "egg": "egg", "nest": "nest with eggs"}
    assert splits.held_out_concepts(names) == {"guitar"}
    by_style = splits.split_of("red-apple", STYLES, False)
    assert {style: s for style, s in by_style.items() if s != splits.TRAIN} == PINNED_APPLE
    colors = {s: splits.held_out_backgrounds("owl", s, attributes.NAMED) for s in STYLES}
    assert {style: c for style, c in colors.items() if c} == PINNED_OWL
    # printf "a\x1fb" | sha256sum: the first 64 bits over 2**64
    assert words.unit_hash("a", "b") == pytest.approx(0.938672836308991)


@pytest.mark.parametrize("count", [2, 3])
def test_two_styles_of_a_concept_stay_in_train(count):
    for i in range(300):
        by_style = splits.split_of(f"c{i}", STYLES[:count], False)
        assert list(by_style.values()).count(splits.TRAIN) >= 2


def test_a_name_that_stands_in_another_is_not_held_out():
    """The hash alone would hold out the egg and the microphone."""
    alone = {"egg": "egg", "microphone": "microphone"}
    assert splits.held_out_concepts(alone) == {"egg", "microphone"}
    others = {"nest": "nest with eggs", "m": "studio microphone"}
    assert splits.held_out_concepts(alone | others) == frozenset()


@pytest.mark.parametrize(
    ("text", "name", "stands"),
    [
        ("a hatching chick, egg", "egg", True),
        ("a nest with eggs", "egg", True),
        ("a shopping bag", "shopping bags", True),
        ("two boxes", "box", True),
        ("a black and white emoji of an eggplant", "egg", False),
        ("a sealed letter", "seal", False),
    ],
)
def test_a_name_is_found_as_a_whole_word_in_singular_and_plural(text, name, stands):
    assert splits.names_in(text, [name]) == ([name] if stands else [])


def test_no_caption_names_a_held_out_concept():
    made = records.make_records(
        [
            concept("guitar", "brown", ["music"]),
            concept("singer", "red", ["guitar", "guitars", "stage"]),
            concept("amplifier", "blue", ["stage", "guitar amp"]),
        ]
    )
    assert {r.features["concept"] for r in made if r.split == "held_out_concepts"} == {"guitar"}
    texts = captions_of(made, *(s for s in splits.SPLITS if s != splits.HELD_OUT_CONCEPTS))
    assert any("stage" in text for text in texts)
    assert not any("guitar" in text for text in texts)
    assert any("music" in text for text in captions_of(made, "held_out_concepts"))


def test_no_caption_joins_style_and_name_to_the_name_of_a_held_out_concept():
    made = records.make_records([concept("white flower", "red"), concept("flower box", "blue")])
    texts = captions_of(made, splits.TRAIN, splits.VALIDATION, splits.HELD_OUT_PAIRS)
    assert any("black and white" in text for text in texts)
    assert not any("white flower" in text for text in texts)


def test_near_copies_and_mirror_images_of_training_images_are_left_out():
    for color in ("#fd0100", "blue"):
        made = records.make_records([concept("guitar", "#ff0000"), concept("lute", color)])
        styles = {
            split: {r.features["style"] for r in made if r.split == split}
            for split in splits.SPLITS
        }
        shown = styles["train"] | styles["validation"]
        assert shown
        if color == "blue":
            assert styles["held_out_concepts"] == set(STYLES)
        else:
            assert not styles["held_out_concepts"] & shown


def test_a_triple_is_left_out_where_a_twin_shows_the_same():
    """The background held out of one pair must not be trained under another name."""
    names = [f"thing {chr(97 + i)}" for i in range(12)]
    apart = [concept(n, f"hsl({30 * i}, 90%, 45%)") for i, n in enumerate(names)]
    alike = [concept(n, "hsl(0, 90%, 45%)") for n in names]

    def shown(made):
        return {
            (r.features["source"].split(":")[0], color)
            for r in made
            if r.split == splits.TRAIN
            for color in r.features["backgrounds"]
        }

    by_split = [
        [r for r in records.make_records(c) if r.split == splits.HELD_OUT_TRIPLES]
        for c in (apart, alike)
    ]
    assert len(by_split[0]) > 10
    trained = shown(records.make_records(alike))
    for record in by_split[1]:
        assert (record.features["style"], record.features["background"]) not in trained


def test_near_duplicates():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, [3, 32, 32, 3]).astype(np.float32)
    queries = np.stack([images[0] + 3, images[1][:, ::-1], images[2][::-1]])
    near = render.near_duplicates(queries, images)
    assert near.tolist() == [[True, False, False], [False, True, False], [False, False, False]]


def drawing(color, clear=8):
    """A square of a colour in a clear frame of that many pixels: RGBA uint8 [64, 64, 4]."""
    image = np.zeros([64, 64, 4], np.uint8)
    image[clear : 64 - clear, clear : 64 - clear] = (*color, 255)
    return image


def test_backgrounds_are_those_on_which_a_drawing_can_be_seen():
    yellow = render.visible_backgrounds(drawing((255, 220, 60)))
    assert "yellow" not in yellow
    assert {"blue", "black", "purple"} <= set(yellow)
    assert "black" not in render.visible_backgrounds(drawing((0, 0, 0)))
    assert render.visible_backgrounds(drawing((255, 0, 0), clear=1)) == []  # no background is seen
    assert render.visible_backgrounds(np.zeros([64, 64, 4], np.uint8)) == []


def test_symmetric_drawings_do_not_change_in_a_mirror():
    image = drawing((255, 0, 0))
    assert not render.changes_in_mirror(image)
    image[:, 32:40, :3] = 0
    assert render.changes_in_mirror(image)


@pytest.fixture(scope="module")
def fixture():
    return {split: tfds_folder.load_arrays(FIXTURE, split) for split in FIXTURE_SPLITS}


def test_fixture_is_small_and_complete(fixture):
    assert sum(p.stat().st_size for p in FIXTURE.iterdir()) < 250_000
    assert set(fixture["train"]["style"]) == set(STYLES)
    assert {False, True} <= set(fixture["train"]["mirrorable"].tolist())
    for arrays in fixture.values():
        assert len(arrays["image"])
        assert set(arrays["license"]) <= {"Apache-2.0", "CC-BY-4.0", "MIT"}


def test_no_pair_concept_or_image_of_the_fixture_leaks(fixture):
    pairs = {
        split: set(zip(arrays["concept_id"], arrays["style"], strict=True))
        for split, arrays in fixture.items()
    }
    alone = [split for split in FIXTURE_SPLITS if split != splits.HELD_OUT_TRIPLES]
    for left, right in itertools.combinations(alone, 2):
        assert not pairs[left] & pairs[right]
    trained = {name for name, _ in pairs["train"]}
    assert {name for name, _ in pairs["validation"] | pairs["held_out_pairs"]} <= trained
    assert not trained & {name for name, _ in pairs["held_out_concepts"]}
    images = {s: {image.tobytes() for image in f["image"]} for s, f in fixture.items()}
    for left, right in itertools.combinations(FIXTURE_SPLITS, 2):
        assert not images[left] & images[right]


def test_triples_of_the_fixture_are_of_known_pairs_and_trained_on_other_backgrounds(fixture):
    train, triples = fixture["train"], fixture["held_out_triples"]
    pairs = zip(train["concept_id"], train["style"], strict=True)
    backgrounds = dict(zip(pairs, train["backgrounds"], strict=True))
    for name, style, color in zip(
        triples["concept_id"], triples["style"], triples["background"], strict=True
    ):
        assert backgrounds[name, style]
        assert color not in backgrounds[name, style]


def test_no_caption_of_the_fixture_names_a_held_out_concept(fixture):
    held_out = set(fixture["held_out_concepts"]["concept"])
    for split in set(FIXTURE_SPLITS) - {"held_out_concepts"}:
        for texts in fixture[split]["captions"]:
            assert not any(splits.names_in(text, held_out) for text in texts)
