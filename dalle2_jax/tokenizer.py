"""CLIP's byte-pair tokenizer, over the library `tokenizers`, with a vocabulary of any size.

Byte-pair encoding starts from the bytes of a text and joins the pair of pieces that comes first in
a list of merges, again and again: "cat" -> c a t</w> -> ca t</w> -> cat</w>. The vocabulary is, in
the order of its ids,

    256                bytes, each as a printable character
    256                the same bytes at the end of a word, as in "t</w>"
    vocab_size - 514   one piece for each merge
    2                  start-of-text and end-of-text

49,408 in all (CLIP, Radford et al. 2021, section 2.4). Merges are in order of frequency, so a small
model takes the first of them: rarer words are split into more pieces, and an id below
`vocab_size - 2` means the same piece at every size.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

MERGES_FILE = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
FULL_VOCAB_SIZE = 49408
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_NUM_BYTE_TOKENS = 2 * 256
# CLIP's words: special tokens, English endings, letters, single digits, other characters.
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Text -> token ids, equal to transformers' CLIPTokenizer at the full size.

    Args:
        context_length: ids of a text, including start- and end-of-text; at least 3.
        vocab_size: from 514 (bytes only) to 49,408 (all of CLIP's merges).

    Raises:
        ValueError: a size out of range.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = FULL_VOCAB_SIZE) -> None:
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: a text needs 3 ids at least")
        if not _NUM_BYTE_TOKENS + 2 <= vocab_size <= FULL_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={vocab_size}: CLIP's merges give from {_NUM_BYTE_TOKENS + 2} "
                f"to {FULL_VOCAB_SIZE}"
            )
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.sot_id = vocab_size - 2
        self.eot_id = vocab_size - 1
        self._backend = _backend(vocab_size)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int32 [n, context_length]: start, pieces (cut to fit), end, zeros."""
        if isinstance(texts, str):
            raise TypeError("Tokenizer takes a list of texts, not one text: write tok([text])")
        room = self.context_length - 2
        tokens = np.zeros((len(texts), self.context_length), np.int32)
        encodings = self._backend.encode_batch_fast(
            [repair_text(text) for text in texts], add_special_tokens=False
        )
        for row, encoding in zip(tokens, encodings, strict=True):
            ids = encoding.ids[:room]
            row[0] = self.sot_id
            row[1 : 1 + len(ids)] = ids
            row[1 + len(ids)] = self.eot_id
        return tokens

    def length(self, text: str) -> int:
        """Returns the number of tokens of the whole text, including start- and end-of-text.

        `__call__` cuts off those beyond the context length.
        """
        return len(self._backend.encode(repair_text(text), add_special_tokens=False).ids) + 2

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text, in lower case, of one row of ids [n], up to the first end-of-text.

        Raises ValueError for an id outside the vocabulary.
        """
        pieces = []
        for i in np.asarray(ids).tolist():
            if i == self.eot_id:
                break
            if i == self.sot_id:
                continue
            piece = self._backend.id_to_token(i)
            if piece is None:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            pieces.append(piece)
        to_byte = {char: byte for byte, char in _byte_characters().items()}
        text = "".join(pieces).replace(WORD_END, " ")  # no byte is written as a space
        raw = b"".join(b" " if char == " " else bytes([to_byte[char]]) for char in text)
        return raw.decode("utf-8", errors="replace").strip()


def repair_text(text: str) -> str:
    """Returns `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    UTF-8 cannot encode a surrogate, but a Python string may hold one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors="replace")
    return text


@functools.cache
def vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns ({piece: id}, merges in order) for a size; cached, so not to be changed."""
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as lines:
        next(lines)  # the version
        count = vocab_size - _NUM_BYTE_TOKENS - 2
        pairs = (next(lines).split() for _ in range(count))
        merges = [(left, right) for left, right in pairs]
    characters = list(_byte_characters().values())
    pieces = characters + [c + WORD_END for c in characters] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate([*pieces, SOT, EOT])}
    return vocab, merges


@functools.cache
def _byte_characters() -> dict[int, str]:
    """Returns {byte: printable character} in CLIP's order; printable bytes are their own."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _backend(vocab_size: int) -> Backend:
    """Returns the library's tokenizer; shared by all `Tokenizer`s of a size."""
    vocab, merges = vocabulary(vocab_size)
    backend = Backend(BPE(vocab, merges, end_of_word_suffix=WORD_END, unk_token=EOT))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (SOT, EOT)])
    return backend
