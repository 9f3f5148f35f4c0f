"""CLIP's tokenizer: reference ids, round trips, and smaller vocabularies."""

import hashlib

import numpy as np
import pytest

from dalle2_jax.tokenizer import FULL_VOCAB_SIZE, MERGES_FILE, Tokenizer, repair_text, vocabulary

# From CLIP's own code and transformers' tests.
REFERENCE = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of a dog": [49406, 320, 1125, 539, 320, 1929, 49407],
    "a diagram": [49406, 320, 22697, 49407],
    "Hello, world!": [49406, 3306, 267, 1002, 256, 49407],
    "": [49406, 49407],
}


@pytest.fixture(scope="module")
def tok():
    return Tokenizer()


@pytest.mark.parametrize("text", REFERENCE)
def test_reference_ids(tok, text):
    row = tok([text])[0]
    want = REFERENCE[text]
    assert row[: len(want)].tolist() == want
    assert not row[len(want) :].any()


def test_the_merges_are_those_that_the_readme_names():
    digest = hashlib.sha256(MERGES_FILE.read_bytes()).hexdigest()
    assert digest in (MERGES_FILE.parent / "README.md").read_text()


def test_vocabulary_is_one_to_one():
    vocab, merges = vocabulary(FULL_VOCAB_SIZE)
    assert len(vocab) == FULL_VOCAB_SIZE
    assert sorted(vocab.values()) == list(range(FULL_VOCAB_SIZE))
    assert len(merges) == 48894


def test_shape_truncation_and_padding(tok):
    rows = tok(["cat " * 200, "cat"])
    assert rows.shape == (2, 77)
    assert rows.dtype == np.int32
    assert rows[0].tolist() == [tok.sot_id] + [2368] * 75 + [tok.eot_id]
    assert rows[1, :4].tolist() == [tok.sot_id, 2368, tok.eot_id, 0]
    assert tok([]).shape == (0, 77)


def test_case_and_white_space_do_not_matter(tok):
    a, b = tok(["A  Red\tApple\n", "a red apple"])
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "text",
    ["a red apple", "😀 👩‍👩‍👧 🇫🇷", "naïve café — 東京", "\u200bzero \x00 null", "žluťoučký kůň"],
)
@pytest.mark.parametrize("vocab_size", [514, 2048, FULL_VOCAB_SIZE])
def test_round_trip(text, vocab_size):
    tok = Tokenizer(context_length=120, vocab_size=vocab_size)
    decoded = tok.decode(tok([text])[0])
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_prefix_vocabulary():
    full, small = Tokenizer(), Tokenizer(vocab_size=4096)
    assert (small.sot_id, small.eot_id) == (4094, 4095)
    pieces = {i: piece for piece, i in vocabulary(FULL_VOCAB_SIZE)[0].items()}
    for piece, i in vocabulary(4096)[0].items():
        assert i >= 4094 or pieces[i] == piece
    # A text whose pieces are all in the smaller vocabulary has the same ids at both sizes.
    a, b = full(["a photo of the day"])[0], small(["a photo of the day"])[0]
    assert (a[1:6] == b[1:6]).all()
    assert a[1:6].max() < 4094
    # Another is split into more pieces, all of them in the vocabulary.
    row = small(["hippopotamus"])[0]
    assert row.max() == small.eot_id
    assert small.decode(row) == "hippopotamus"


@pytest.mark.parametrize("text", ["\ud800", "x \udfff y", "\ude00\ud83d", "a\ud83d"])
def test_lone_surrogates_become_replacement_characters(tok, text):
    repaired = repair_text(text)
    repaired.encode("utf-8")
    assert "\ufffd" in repaired
    np.testing.assert_array_equal(tok([text]), tok([repaired]))


def test_surrogate_pairs_are_joined(tok):
    assert repair_text("hi \ud83d\ude00") == "hi 😀"
    assert repair_text("hi 😀") == "hi 😀"


def test_mistakes_are_named(tok):
    with pytest.raises(TypeError, match="list of texts"):
        tok("one text")
    with pytest.raises(ValueError, match="vocab_size=100"):
        Tokenizer(vocab_size=100)
    with pytest.raises(ValueError, match="context_length=2"):
        Tokenizer(context_length=2)
    with pytest.raises(ValueError, match="49999"):
        tok.decode([49999])
