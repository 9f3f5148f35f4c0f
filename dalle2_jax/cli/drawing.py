"""What sample.py does: a model's pictures as PNG files and one grid, with bars of progress."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_jax.imaging import files
from dalle2_jax.imaging.decode import crop_resize
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.version import __version__

_ALL = "all of it"
_GRID_SIDE = 256  # pixels of a picture in the grid at most: there may be many


class Bars:
    """A progress bar a stage."""

    def __init__(self) -> None:
        self.bars: dict[str, tqdm] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.bars:
            self.bars[stage] = tqdm(total=total, desc=f"{stage:>16}", unit="step", leave=True)
        self.bars[stage].update(done - self.bars[stage].n)
        if done == total:  # of this pass: a picture is inverted first, and then drawn
            self.bars.pop(stage).close()


def draw_prompts(
    model: DALLE2,
    prompts: Sequence[str],
    n: int,
    seed: int,
    batch_size: int,
    out: Path,
    best_of: int | None = None,
) -> Path:
    """Writes n pictures a prompt into the folder `out`, each as soon as it is drawn; or of
    `best_of` the n best, with their scores.

    Every PNG carries its prompt, seed, settings and weights. The seed stands in its name too, so
    that another seed's pictures stay beside it. Returns the path of grid.png, this run's, a row a
    prompt. A prompt that is too long is told on stderr, with what is read of it.
    """
    say_what_is_read(model, prompts)
    about: dict[str, Any] = {"seed": seed, "size": model.image_size, "version": __version__}
    about |= {"weights": model.weights, "hash": model.weights_hash, "settings": model.settings()}
    drawn: list[np.ndarray] = []
    for picture, told in _drawn(model, prompts, n, seed, batch_size, best_of):
        row, number = divmod(len(drawn), n)
        name = f"{row:03d}-{files.slug(prompts[row])}-s{seed}-{number}.png"
        files.save_png(out / name, picture, {"prompt": prompts[row], **told, **about})
        drawn.append(crop_resize(picture, min(len(picture), _GRID_SIDE), (1.0, 0.5, 0.5)))
    grid = files.labelled_grid(np.stack(drawn), n, row_labels=prompts)
    files.save_png(out / "grid.png", grid, {"prompts": prompts, **about})
    return out / "grid.png"


def say_what_is_read(model: DALLE2, prompts: Sequence[str]) -> None:
    """A line on stderr for each prompt that is longer than what the model reads."""
    for prompt in prompts:
        clip, decoder = (_read_of(tokenizer, prompt) for tokenizer in model.tokenizers())
        if clip == decoder != _ALL:
            print(f"note: a prompt is too long, {clip} is read", file=sys.stderr)
        elif clip != decoder:
            told = f"CLIP reads {clip}, the decoder {decoder}"
            print(f"note: a prompt is too long, {told}", file=sys.stderr)


def _drawn(
    model: DALLE2,
    prompts: Sequence[str],
    n: int,
    seed: int,
    batch_size: int,
    best_of: int | None,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """n pictures of each prompt, each with what is its own."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": Bars()}
    if best_of is not None:
        for one in itertools.chain.from_iterable(
            model.ranked(prompts, n, best_of, seed, **options)
        ):
            yield one.picture, {"index": one.index, "best_of": best_of, "score": one.score}
    else:
        batches = model.stream(prompts, n, seed, **options)
        for place, picture in enumerate(itertools.chain.from_iterable(batches)):
            yield picture, {"index": place % n}


def _read_of(tokenizer: Tokenizer, prompt: str) -> str:
    if tokenizer.length(prompt) <= tokenizer.context_length:
        return _ALL
    return f"only {tokenizer.decode(tokenizer([prompt])[0])!r}"
