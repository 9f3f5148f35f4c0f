"""The judge: a CLIP that scores generated images and takes no part in generating them.

A model that were scored by its own CLIP would be rewarded for the mistakes of that CLIP, since the
prior and the decoder learned to please it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dalle2_jax.data.emoji import words
from dalle2_jax.errors import UserError
from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.forward import forward
from dalle2_jax.sampling import load
from dalle2_jax.sampling.preprocess import preprocess
from dalle2_jax.storage import model_folder, model_names
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params

# The caption templates without a keyword; a keyword would add words that the pair does not imply.
TEMPLATES = tuple(i for i, t in enumerate(words.TEMPLATES) if "{tag}" not in t)
_CAPTIONS_PER_IMAGE = 4  # how many times larger a batch of captions is: captions cost less


@dataclasses.dataclass(frozen=True)
class Judge:
    """A CLIP with its weights, which embeds images, captions and (concept, style) pairs.

    Attributes:
        network: the CLIP; it must have an image tower.
        params: its weights.
        tokenizer: the tokenizer for its context length and vocabulary.
        weights_hash: 16 hex digits that identify configuration and weights, for reports.
        batch_size: images per batch.
    """

    network: CLIP
    params: Params
    tokenizer: Tokenizer
    weights_hash: str
    batch_size: int = 64

    @classmethod
    def load(cls, folder: str, batch_size: int = 64) -> Judge:
        """Loads the stage `clip` of a model folder.

        Raises:
            UserError: the folder is missing or damaged, has no CLIP, or one without image tower.
        """
        try:
            path = model_names.resolve(folder)
        except UserError as error:
            raise UserError(
                f"judge: {error}; train one: python train.py --config=configs/clip.py:judge "
                "--workdir=runs/judge"
            ) from error
        network, params = load.network(path, "clip"), load.params(path, "clip")
        if network.image is None:
            raise UserError(f"judge: {folder} has no image tower: it cannot read images")
        text = network.text
        return cls(
            network=network,
            params=params,
            tokenizer=Tokenizer(text["context_length"], text["vocab_size"]),
            weights_hash=model_folder.weights_hash(path),
            batch_size=batch_size,
        )

    def is_clip(self, params: Params) -> bool:
        """Returns whether `params` equal the judge's own, in which case it would judge itself."""
        ours, theirs = jax.tree.leaves_with_path(self.params), jax.tree.leaves_with_path(params)
        return len(ours) == len(theirs) and all(
            path == path_2 and np.array_equal(leaf, leaf_2)
            for (path, leaf), (path_2, leaf_2) in zip(ours, theirs, strict=True)
        )

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Embeds images uint8 [n, h, w, 3] of any size: unit z_img float32 [n, dim].

        Of an image that is not square the middle is read, as in training.
        """

        def encode(rows: np.ndarray) -> Array:
            inputs = preprocess(rows, self.network.image)
            return _encode_images(self.network, self.params, inputs)

        return _in_batches(encode, images, self.batch_size)

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds n captions: unit z_txt float32 [n, dim]."""
        encode = functools.partial(_encode_captions, self.network, self.params)
        return _in_batches(encode, self.tokenizer(list(captions)), self.batch_size)

    def embed_pairs(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Embeds n (concept, style) pairs: float32 [n, dim], of unit length.

        The embedding of a pair is the normalised mean over the captions of all templates, so that
        the words of no single template matter (prompt ensembling, 2103.00020, section 3.1.4).
        """
        captions = [words.caption(c, s, template) for c, s in pairs for template in TEMPLATES]
        text_judge = dataclasses.replace(self, batch_size=self.batch_size * _CAPTIONS_PER_IMAGE)
        z = text_judge.embed_captions(captions).reshape(len(pairs), len(TEMPLATES), -1).mean(axis=1)
        return z / np.linalg.norm(z, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _encode_images(network: CLIP, params: Params, images: Array) -> Array:
    # `CLIP.__call__` normalises, even where the config says `unit_length: False`.
    return forward(network, params, images, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _encode_captions(network: CLIP, params: Params, tokens: Array) -> Array:
    return forward(network, params, None, tokens)[1]


def _in_batches(encode: Callable[[np.ndarray], Array], rows: np.ndarray, size: int) -> np.ndarray:
    """Returns encode(rows) of rows [n, ...], computed in batches of exactly `size` rows.

    The last batch is filled with copies of the last row, so that only one program is compiled.
    """
    results = []
    for start in range(0, len(rows), size):
        index = np.minimum(np.arange(start, start + size), len(rows) - 1)
        results.append(np.asarray(encode(rows[index]))[: len(rows) - start])
    return np.concatenate(results)
