"""Captions and splits of the emoji set: no library, no pictures."""

import itertools

import pytest

from dalle2_jax.data.emoji import words as words
from dalle2_jax.data.emoji.icon_sets import clean_name

STYLES = list(words.STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_every_caption_names_concept_and_style(style):
    for index in range(words.NUM_TEMPLATES):
        text = words.caption("slice of red apple", style, index, "fruit")
        assert "slice of red apple" in text
        assert words.STYLES[style].short in text
        assert len(text.split()) <= 14


def test_canonical_captions():
    expected = {
        "noto": "a noto emoji of an owl",
        "noto-v1": "an old noto emoji of an owl",
        "twemoji": "a twemoji of an owl",
        "fluent-emoji": "a glossy 3d emoji of an owl",
        "fluent-emoji-flat": "a flat emoji of an owl",
        "fluent-emoji-high-contrast": "a black and white emoji of an owl",
    }
    assert {style: words.caption("owl", style) for style in STYLES} == expected


def test_no_caption_fits_two_styles():
    texts = [words.caption("owl", s, i) for s in STYLES for i in range(words.NUM_TEMPLATES)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("octopus", "an octopus"),
        ("grapes", "grapes"),
        ("bread", "bread"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("statue of liberty", "the statue of liberty"),
        ("face with tears of joy", "a face with tears of joy"),
        ("glass of milk", "a glass of milk"),
        ("people holding hands", "people holding hands"),
    ],
)
def test_articles(name, expected):
    assert words.with_article(name) == expected


def test_captions_are_eight_and_fixed_and_keywords_do_not_repeat_the_name():
    tags = ("apple", "fruit", "food", "diet")
    first = words.captions("red apple", "noto", tags)
    assert len(first) == words.CAPTIONS_PER_PICTURE
    assert first[0] == words.caption("red apple", "noto")
    assert first == words.captions("red apple", "noto", tags[::-1])
    assert not any("apple, apple" in text for text in first)
    assert any(tag in text for text in first for tag in ("fruit", "food", "diet"))
    assert len(words.captions("red apple", "noto")) == words.CAPTIONS_PER_PICTURE


def test_splits_do_not_leak_and_have_the_stated_shares():
    concepts = [f"concept-{i}" for i in range(4000)]
    splits = {c: words.split_of(c, STYLES) for c in concepts}
    for by_style in splits.values():
        kinds = set(by_style.values())
        # a concept is held out in all its styles or in none
        assert kinds == {"held_out_concepts"} or "held_out_concepts" not in kinds
        # a held-out pair's concept is trained in two other styles at least
        if "held_out_pairs" in kinds:
            assert list(by_style.values()).count("train") >= 2
    flat = list(itertools.chain.from_iterable(s.values() for s in splits.values()))
    assert flat.count("held_out_concepts") / len(flat) == pytest.approx(0.02, abs=0.007)
    assert flat.count("held_out_pairs") / len(flat) == pytest.approx(0.098, abs=0.01)


def test_splits_are_a_function_of_names_alone():
    for i in range(50):
        assert words.split_of(f"c{i}", STYLES) == words.split_of(f"c{i}", STYLES[::-1])
    # Pinned: these may not move, or trained weights would have seen what is held out.
    assert set(words.split_of("guitar", STYLES).values()) == {"held_out_concepts"}
    assert set(words.split_of("fox", STYLES).values()) != {"held_out_concepts"}
    # printf "a\x1fb" | sha256sum: the first 64 bits over 2**64
    assert words.unit_hash("a", "b") == pytest.approx(0.938672836308991)


def test_few_styles_keep_two_in_train():
    for i in range(300):
        by_style = words.split_of(f"c{i}", STYLES[:2])
        assert "held_out_pairs" not in by_style.values()


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("family: man, woman", "family man woman"),
        ("man\u2019s shoe", "man's shoe"),
        ("pi\u00f1ata", "pinata"),
        ("A button (blood type)", "a button blood type"),
        ("T-Rex", "t-rex"),
    ],
)
def test_clean_name(label, name):
    assert clean_name(label) == name
