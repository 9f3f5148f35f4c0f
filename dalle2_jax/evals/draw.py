"""The pictures that are judged, drawn by a DALLE2: from captions, or from true embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import images
from dalle2_jax.dalle2 import DALLE2
from dalle2_jax.nets.clip import CLIP, TextEncoding
from dalle2_jax.types import Array, Params

Progress = Callable[[int], None]
"""Called with the number of pictures that were just drawn."""


def generate(
    model: DALLE2, captions: Sequence[str], seed: int, batch_size: int, progress: Progress
) -> np.ndarray:
    """One picture of each caption by the whole cascade -> uint8 [n, h, w, 3].

    Batch i is drawn with seed + i: the pictures of one call of DALLE2.generate share their noise.
    """
    drawn = []
    for i, (rows, index) in enumerate(_batches(len(captions), batch_size)):
        prompts = [captions[j] for j in index]
        pictures = model.generate(prompts, seed=(seed + i) % 2**32, batch_size=batch_size)
        drawn.append(pictures[:rows])
        progress(rows)
    return np.concatenate(drawn)


def reconstruct(
    model: DALLE2,
    captions: Sequence[str],
    pictures: np.ndarray,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> np.ndarray:
    """Like `generate`, but the decoder is given the true pictures' z_img in place of the prior's.

    What this finds and `generate` does not is lost by the prior, what neither finds by the decoder
    and the upsamplers.
    """
    drawn = []
    for i, (rows, index) in enumerate(_batches(len(captions), batch_size)):
        tokens = jnp.asarray(model.tokenizer([captions[j] for j in index]))
        z_img, text = _encode(model.clip, model.params["clip"], pictures[index], tokens)
        key = jax.random.fold_in(jax.random.key(seed), i)
        decoder_key, *keys = jax.random.split(key, 1 + len(model.upsamplers))
        split = functools.partial(jax.random.split, num=len(index))
        x = model.decode(z_img, text, tokens, split(decoder_key))
        for (name, upsampler), upsampler_key in zip(model.upsamplers.items(), keys, strict=True):
            x = upsampler(model.params[name], x, split(upsampler_key))
        drawn.append(np.asarray(images.to_uint8(x))[:rows])
        progress(rows)
    return np.concatenate(drawn)


@functools.partial(jax.jit, static_argnums=0)
def _encode(clip: CLIP, params: Params, pictures: Array, tokens: Array) -> tuple:
    small = images.resize(images.to_float(pictures), clip.image["image_size"], "area")
    z_img = clip.apply({"params": params}, small, method="encode_image")
    text: TextEncoding = clip.apply({"params": params}, tokens, method="encode_text")
    return z_img, text


def _batches(n: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(rows that count, their places), all batches of one size so that one program serves them."""
    size = min(size, n)
    for start in range(0, n, size):
        yield min(size, n - start), np.minimum(np.arange(start, start + size), n - 1)
