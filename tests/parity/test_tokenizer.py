"""1,000 varied strings against transformers' CLIPTokenizer built from the same merges."""

import json
import random

import numpy as np
import pytest

from dalle2_jax.tokenizer import FULL_VOCAB_SIZE, Tokenizer, repair_text, vocabulary

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

SENTENCE = """a red apple Photo of THE cat's don't we'll I'm hippopotamus 3d 2048 x86 é naïve
ŽLUŤOUČKÝ 東京 привет مرحبا שלום हिन्दी ไทย 한국어 İstanbul ǅ ﬁ ß Σς e\u0301 o\u0308\u0323"""
WORDS = SENTENCE.split()
EMOJI = "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ 🫠".split(" ")
MARKS = "! ... ?! — 's 'S '' \" @#$% _ ½ ² ٣ \u0301 <| </w> <|endoftext|> <|StartOfText|>".split(
    " "
)
SPACES = [" ", "  ", "\t", "\n", "\u00a0", "\u2003", "\u200b", "\r\n", "\x85", "\x1f", ""]
BROKEN = list("\ufffd\x00\x07\ufeff\uffff\U0010ffff\ue000\xad\ud800\udc00")


def random_text(rng: random.Random) -> str:
    pools = [WORDS] * 6 + [EMOJI, MARKS, BROKEN]
    parts = []
    for _ in range(rng.randint(0, 30)):
        parts.append(rng.choice(rng.choice(pools)))
        parts.append(rng.choice(SPACES if rng.random() < 0.3 else [" "]))
    if rng.random() < 0.2:  # any code points, surrogates too
        parts += [chr(rng.randrange(0x110000)) for _ in range(8)]
    if rng.random() < 0.1:  # UTF-8 cut in the middle and read as if whole
        raw = "".join(parts).encode("utf-8", "ignore")
        parts = [raw[: rng.randint(0, len(raw))].decode("utf-8", rng.choice(["replace", "ignore"]))]
    if rng.random() < 0.1:
        parts = ["".join(parts).encode("utf-8", "ignore").decode("latin-1")]  # mojibake
    return "".join(parts)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    vocab, merges = vocabulary(FULL_VOCAB_SIZE)
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


def test_thousand_strings(reference):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(1000)]
    texts[:3] = ["", " ", "a photo of a cat"]
    tok = Tokenizer()
    ours = tok(texts)
    # A Python string may hold a lone surrogate, which no UTF-8 library takes: repaired in both.
    theirs = reference([repair_text(t) for t in texts], truncation=True, max_length=77)["input_ids"]
    assert len({tuple(ids) for ids in theirs}) > 950
    for text, row, ids in zip(texts, ours, theirs, strict=True):
        assert row[: len(ids)].tolist() == ids, repr(text)
        assert not row[len(ids) :].any(), repr(text)
    np.testing.assert_array_equal(
        [reference.bos_token_id, reference.eos_token_id], [tok.sot_id, tok.eot_id]
    )
