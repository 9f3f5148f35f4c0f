"""Captions of the emoji set: no images."""

import pytest

from dalle2_jax.data.emoji import words
from dalle2_jax.data.emoji.concepts import clean_name

STYLES = list(words.ALL_STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_every_caption_names_concept_and_style(style):
    for index in range(words.NUM_TEMPLATES):
        text = words.caption("slice of red apple", style, index, "fruit")
        assert "slice of red apple" in text
        assert words.ALL_STYLES[style].short in text
        assert len(text.split()) <= 14


def test_canonical_captions():
    expected = {
        "noto": "a noto emoji of an owl",
        "noto-v1": "an old noto emoji of an owl",
        "twemoji": "a twemoji of an owl",
        "fluent-emoji": "a glossy 3d emoji of an owl",
        "fluent-emoji-flat": "a flat emoji of an owl",
        "fluent-emoji-high-contrast": "a black and white emoji of an owl",
        "emojione": "an emojione emoji of an owl",
        "emojione-monotone": "a monotone emoji of an owl",
        "fxemoji": "a firefox emoji of an owl",
        "streamline-emojis": "a streamline emoji of an owl",
        "openmoji": "an openmoji of an owl",
        "emojione-v1": "an old emojione emoji of an owl",
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


def test_a_caption_names_the_background_unless_it_is_white():
    assert words.caption("owl", "noto", background="white") == "a noto emoji of an owl"
    orange = words.caption("owl", "noto", background="orange")
    assert orange == "a noto emoji of an owl on an orange background"


def test_captions_are_fixed_and_differ_and_keywords_do_not_repeat_the_name():
    tags = ("apple", "fruit", "food", "diet", "orchard", "tree")
    first = words.captions("red apple", "noto", tags)
    assert first[0] == words.caption("red apple", "noto")
    assert first == words.captions("red apple", "noto", tags[::-1])
    assert len(set(first)) == len(first)
    assert not any("apple, apple" in text for text in first)
    with_keyword = [t for t in first if any(tag in t for tag in tags[1:])]
    assert len(with_keyword) == words.MAX_KEYWORD_CAPTIONS
    without = words.captions("red apple", "noto")
    assert set(without) == set(first) - set(with_keyword)


def test_plain_captions_name_no_style():
    shared = set.intersection(*(set(words.captions("red apple", s)) for s in STYLES))
    assert shared == {"a red apple", "an emoji of a red apple"}


def test_styles_share_a_concepts_keywords_between_them():
    tags = [f"tag{chr(97 + i)}" for i in range(12)]
    texts = [text for style in STYLES for text in words.captions("owl", style, tags)]
    assert all(any(tag in text for text in texts) for tag in tags)


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
