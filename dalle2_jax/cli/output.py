"""Answers a request on the command line: files, grids, animations and progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_jax.imaging import canvas, files, grids
from dalle2_jax.imaging.crops import crop_resize
from dalle2_jax.pipelines import notes, requests
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.events import StageProgress
from dalle2_jax.pipelines.modes import GENERATE
from dalle2_jax.pipelines.request import Request
from dalle2_jax.pipelines.requests import Generated

_GRID_SIDE = 256  # largest side in pixels of an image in grid.png, which may show many
_FRAME_MS = 150  # how long a frame of an animation shows
_MOVING = ("interpolate", "text_diff", "probe")  # modes whose images are steps of one motion


class Bars:
    """Progress bars on stderr, one for each stage."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of a stage to `done` of `total` steps; makes one at its first step."""
        if stage not in self._bars:
            self._bars[stage] = tqdm(total=total, desc=f"{stage:>16}", unit="step", leave=True)
        # tqdm counts increments, events count from the start.
        self._bars[stage].update(done - self._bars[stage].n)
        if done == total:  # the same stage may run again: an image is inverted, then decoded
            self._bars.pop(stage).close()


def write(model: DALLE2, request: Request, out: Path, only: tuple[int, int] | None = None) -> Path:
    """Generates what the request asks for and writes it into the folder `out`.

    Every PNG carries its request, settings and weights, and its name the seed, so that the images
    of another seed stay beside it. Notes on prompts that are cut go to stderr.

    Args:
        only: (row, index) of the one image to generate, see `requests.run`; None: all.

    Returns:
        The path of the grid of all images, or of the one image.
    """
    for line in notes.lines(requests.prepare(model, request), request):
        print(f"note: {line}", file=sys.stderr)
    write_images = _write_prompts if request.mode == GENERATE else _write_edits
    return write_images(model, request, out, only)


def _run(model: DALLE2, request: Request, only: tuple[int, int] | None) -> Iterator[Generated]:
    """Yields the images of a request, and shows its progress on stderr."""
    bars = Bars()
    for event in requests.run(model, request, only=only):
        if isinstance(event, Generated):
            yield event
        elif isinstance(event, StageProgress):
            bars.update(event.stage, event.done, event.total)


def _write_prompts(
    model: DALLE2, request: Request, out: Path, only: tuple[int, int] | None
) -> Path:
    """Writes each image as soon as it is done, then grid.png with a row for each prompt."""
    thumbnails: list[np.ndarray] = []
    file, metadata, rank, row = out, {}, 0, -1
    for one in _run(model, request, only):
        rank = rank + 1 if one.row == row else 0  # with best_of the best is number 0
        row = one.row
        # The file of a repeated image has the name that it had among all.
        number = rank if only is None else one.index
        name = f"{one.row:03d}-{files.slug(one.label)}-s{request.seed}-{number}.png"
        file, metadata = out / name, one.metadata
        # Written at once, so that Ctrl-C or a full disk loses one image and not all of them.
        files.save_png(file, one.image, metadata)
        # Only thumbnails are held: a file of a thousand prompts must not fill the memory.
        thumbnails.append(crop_resize(one.image, min(len(one.image), _GRID_SIDE)))
    if only is not None:
        return file
    grid = grids.labelled_grid(np.stack(thumbnails), request.n, row_labels=request.prompts)
    files.save_png(out / "grid.png", grid, _of_all(metadata))
    return out / "grid.png"


def _write_edits(model: DALLE2, request: Request, out: Path, only: tuple[int, int] | None) -> Path:
    """Writes the images, MODE.png with all of them, and an animation of those that move.

    Before the results of an input image, MODE.png shows the image itself, and what its mask marks.
    """
    # The images of all rows are held until the end: there are few, and the grid needs them.
    rows: dict[int, list[Generated]] = {}
    for one in _run(model, request, only):
        rows.setdefault(one.row, []).append(one)
    file, frames, labels, metadata = out, [], [], {}
    for row, generated in rows.items():
        inputs = _inputs(model, request, row)
        prefix = f"{request.mode}-s{request.seed}-{row:03d}"
        metadata = generated[0].metadata
        # Inputs have the first numbers: a folder sorted by name shows them before the results.
        if only is None:
            for number, (label, image) in enumerate(inputs):
                name = f"{prefix}-{number:02d}-{files.slug(label)}.png"
                files.save_png(out / name, image, _of_all(metadata) | {"label": label})
                frames.append(image)
                labels.append(label)
        for one in generated:
            number = len(inputs) + one.index
            file = out / f"{prefix}-{number:02d}-{files.slug(one.label)}.png"
            files.save_png(file, one.image, one.metadata)
            frames.append(one.image)
            labels.append(one.label)
    if only is not None:
        return file
    if request.mode in _MOVING:
        files.save_animation(out / f"{request.mode}.webp", frames, _FRAME_MS)
    grid = grids.labelled_grid(frames, len(frames) // len(rows), image_labels=labels)
    files.save_png(out / f"{request.mode}.png", grid, _of_all(metadata))
    return out / f"{request.mode}.png"


def _inputs(model: DALLE2, request: Request, row: int) -> list[tuple[str, np.ndarray]]:
    """Returns (label, image) of what is shown before the results of input image `row`."""
    size = requests.prepare(model, request).image_size
    if request.mode in ("reconstruct", "variations"):
        return [("given", crop_resize(request.images[row].pixels, size))]
    if request.mode == "inpaint":
        image, edit_mask = canvas.fit_square(request.images[0].pixels, request.edit_mask, size)
        return [("given", image), ("mask", _striped(image, edit_mask))]
    return []


def _of_all(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a grid: without what is true of one image only."""
    of_one = ("prompt", "row", "index", "label", "score")
    return {name: value for name, value in metadata.items() if name not in of_one}


def write_mask_preview(request: Request, out: Path) -> Path:
    """Writes mask.png, the image with stripes where it would be regenerated. Needs no model."""
    image = request.images[0].pixels
    if request.mode == "inpaint":
        side = min(image.shape[:2])
        image, edit_mask = canvas.fit_square(image, request.edit_mask, side)
    else:
        image, known_mask, _ = canvas.extend(image, request.margins, 1)
        edit_mask = ~known_mask
    files.save_png(out / "mask.png", _striped(image, edit_mask))
    return out / "mask.png"


def _striped(image: np.ndarray, edit_mask: np.ndarray) -> np.ndarray:
    """Returns uint8 [h, w, 3] with diagonal stripes of red and white where `edit_mask` is True."""
    width = max(4, min(edit_mask.shape) // 32)
    stripe = np.indices(edit_mask.shape).sum(axis=0) // width  # number of a pixel's stripe [h, w]
    colours = np.where(stripe[..., None] % 2, [255, 0, 0], [255, 255, 255])
    tinted = (0.4 * image + 0.6 * colours).astype(np.uint8)
    return np.where(edit_mask[..., None], tinted, image)


def name_in(path: str, out: Path) -> str:
    """Returns the name of an input in metadata: relative to `out`, if both are on this machine.

    So a folder that holds the images and their inputs can be moved.
    """
    if "://" in path or "://" in str(out):
        return path
    try:
        return os.path.relpath(path, out)
    except ValueError:  # another drive
        return path
