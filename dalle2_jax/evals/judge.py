"""A judge: a CLIP that took no part in drawing, with which pictures are scored."""

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
from dalle2_jax.storage import model_folder
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.types import Array, Params

# Words that every caption holds; a keyword beside the name would say more than was asked.
TEMPLATES = tuple(i for i, t in enumerate(words.TEMPLATES) if "{tag}" not in t)
_TEXTS_A_PICTURE = 4  # of a batch: a caption costs far less than a picture


@dataclasses.dataclass(frozen=True)
class Judge:
    network: CLIP
    params: Params
    tokenizer: Tokenizer
    weights_hash: str
    batch_size: int = 64

    @classmethod
    def load(cls, folder: str, batch_size: int = 64) -> Judge:
        """From the stage `clip` of a model folder.

        Raises:
            UserError: the folder is missing or damaged, or has no CLIP.
        """
        try:
            path = model_folder.resolve(folder)
        except UserError as error:
            raise UserError(
                f"judge: {error}; train one: python train.py --config=configs/clip.py:judge "
                "--workdir=runs/judge"
            ) from error
        network, params = load.network(path, "clip"), load.params(path, "clip")
        if network.image is None:
            raise UserError(f"judge: {folder} has no image tower: it cannot see pictures")
        text = network.text
        return cls(
            network=network,
            params=params,
            tokenizer=Tokenizer(text["context_length"], text["vocab_size"]),
            weights_hash=model_folder.weights_hash(path),
            batch_size=batch_size,
        )

    def is_clip(self, params: Params) -> bool:
        """Whether these are the judge's own weights, so that it would judge itself."""
        mine, other = jax.tree.leaves_with_path(self.params), jax.tree.leaves_with_path(params)
        return len(mine) == len(other) and all(
            name == name_2 and np.array_equal(leaf, leaf_2)
            for (name, leaf), (name_2, leaf_2) in zip(mine, other, strict=True)
        )

    def embed_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] of any size -> unit z_img float32 [n, dim].

        Of a picture that is not square the middle is read, as in training.
        """

        def encode(rows: np.ndarray) -> Array:
            seen = preprocess(rows, self.network.image)
            return _encode_pictures(self.network, self.params, seen)

        return _in_batches(encode, pictures, self.batch_size)

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """n sentences -> unit z_txt float32 [n, dim]."""
        encode = functools.partial(_encode_captions, self.network, self.params)
        return _in_batches(encode, self.tokenizer(list(captions)), self.batch_size)

    def embed_pairs(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """n (concept, style) -> float32 [n, dim], unit means over the captions of each pair.

        The mean takes away what is due to one template's words (prompt ensembling, 2103.00020,
        section 3.1.4).
        """
        captions = [words.caption(c, s, template) for c, s in pairs for template in TEMPLATES]
        large = dataclasses.replace(self, batch_size=self.batch_size * _TEXTS_A_PICTURE)
        z = large.embed_captions(captions).reshape(len(pairs), len(TEMPLATES), -1).mean(axis=1)
        return z / np.linalg.norm(z, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _encode_pictures(network: CLIP, params: Params, pictures: Array) -> Array:
    return forward(network, params, pictures, None)[0]  # of unit length, whatever the CLIP says


@functools.partial(jax.jit, static_argnums=0)
def _encode_captions(network: CLIP, params: Params, tokens: Array) -> Array:
    return forward(network, params, None, tokens)[1]


def _in_batches(encode: Callable[[np.ndarray], Array], rows: np.ndarray, size: int) -> np.ndarray:
    """encode(rows) in batches that are all of one size, so that one program serves them."""
    out = []
    for start in range(0, len(rows), size):
        index = np.minimum(np.arange(start, start + size), len(rows) - 1)
        out.append(np.asarray(encode(rows[index]))[: len(rows) - start])
    return np.concatenate(out)
