"""CLIP's byte-pair tokenizer over the kept library `tokenizers`, cut to any size of vocabulary.

The vocabulary is 256 byte characters, the same 256 closing a word, one entry a merge, then
start-of-text and end-of-text (CLIP, Radford et al. 2021, section 2.4: 49,408 in all). Merges are
ordered by how frequent they were, so a small model keeps a prefix of them: words outside it split
into more pieces, and an id below `vocab_size - 2` means the same piece at every size.
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
_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Text -> token ids, equal to transformers' CLIPTokenizer at the full size.

    Args:
      context_length: ids per text, start- and end-of-text included.
      vocab_size: from 514 (bytes alone) to 49,408 (all of CLIP's merges).
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
        """Texts -> int32 [n, context_length]: start, pieces (cut to fit), end, zeros."""
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
        """Counts the tokens of the whole text, sot and eot among them.

        More than the context length are cut off.
        """
        return len(self._backend.encode(repair_text(text), add_special_tokens=False).ids) + 2

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """One row of ids [n] -> the lower-case text it stands for, up to the first end-of-text."""
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
        text = "".join(pieces).replace(WORD_END, " ")  # no byte's character is a space
        raw = b"".join(b" " if char == " " else bytes([to_byte[char]]) for char in text)
        return raw.decode("utf-8", errors="replace").strip()


def repair_text(text: str) -> str:
    """Joins surrogate pairs and turns lone ones into U+FFFD: UTF-8 cannot hold a surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors="replace")
    return text


@functools.cache
def vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(piece -> id, merges in order) of CLIP's BPE, cut to `vocab_size`; read-only."""
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as lines:
        next(lines)  # the version
        kept = vocab_size - _NUM_BYTE_TOKENS - 2
        pairs = (next(lines).split() for _ in range(kept))
        merges = [(left, right) for left, right in pairs]
    characters = list(_byte_characters().values())
    pieces = characters + [c + WORD_END for c in characters] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate([*pieces, SOT, EOT])}
    return vocab, merges


@functools.cache
def _byte_characters() -> dict[int, str]:
    """Byte -> a printable character, in CLIP's order: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _backend(vocab_size: int) -> Backend:
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
