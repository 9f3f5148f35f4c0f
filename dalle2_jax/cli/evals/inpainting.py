"""Judges inpainting and outpainting: dalle2 evals inpainting --weights tiny

A part of each held-out pair's image is erased and regenerated from the caption. Two tables are
printed. In the first, a judge looks for the concept and the style, in the whole image and in the
regenerated part alone. The second measures seams: the steps in colour across the edge of the mask
and beside it, as generated, without the feather that hides a seam, and in the true images.

Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

if TYPE_CHECKING:
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.pipelines.dalle2 import DALLE2

OUT = flags.DEFINE_string("out", "out/evals_inpainting", "Folder for the grid of images.")
NUM = flags.DEFINE_integer("num", 64, "Number of held-out pairs.", 1)
_GRID_ROWS = 12

prepare = commands.stop_at_once


def main() -> None:
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    from dalle2_jax.evals import report, seams
    from dalle2_jax.imaging import files, grids
    from dalle2_jax.imaging.crops import crop_resize
    from dalle2_jax.storage import paths

    commands.keep_compiled_programs()
    out = paths.prepare_folder(OUT.value)
    model = shared.load_model()
    judge = shared.load_judge(model)
    group, concepts = shared.read_held_out_pairs(NUM.value)
    size = model.image_size
    true = np.stack([crop_resize(image, size) for image in group.images])

    generators, seam_rows, columns = {}, [], [true]
    for name, edit_mask in seams.edit_masks(size).items():
        generated = _inpaint(model, group, true, edit_mask, name)
        sharp = _inpaint(model, group, true, edit_mask, f"{name}, no feather", feather=0)
        inside, white = edit_mask[..., None], np.full_like(true, 255)
        generators[f"{name}: generated"] = _constant(generated)
        generators[f"{name}: erased"] = _constant(np.where(inside, white, true))
        generators[f"{name}: the generated part alone"] = _constant(
            np.where(inside, generated, white)
        )
        generators[f"{name}: that part, true"] = _constant(np.where(inside, true, white))
        steps = [seams.measure(images, edit_mask) for images in (generated, sharp, true)]
        seam_rows.append(seams.Seam(name, *steps))
        columns += [np.where(inside, np.uint8(128), true), generated]

    name, edit_mask = "left half, extended", np.arange(size)[None].repeat(size, 0) >= size // 2
    generated = _extend_left_half(model, group, true, name)
    sharp = _extend_left_half(model, group, true, f"{name}, no feather", feather=0)
    generators[name] = _constant(generated)
    steps = [seams.measure(images, edit_mask) for images in (generated, sharp, true)]
    seam_rows.append(seams.Seam(name, *steps))
    columns.append(generated)

    scores, _ = report.evaluate(judge, [group], concepts, generators, shared.SEED.value)
    print(report.to_markdown(scores))
    print(seams.to_markdown(seam_rows))
    grid = np.stack(columns, axis=1)[:_GRID_ROWS].reshape(-1, size, size, 3)
    files.save_png(out / "inpainting.png", grids.labelled_grid(grid, len(columns)))
    print(out / "inpainting.png")


def _inpaint(
    model: DALLE2,
    group: Group,
    true: np.ndarray,
    edit_mask: np.ndarray,
    name: str,
    feather: int | None = None,
) -> np.ndarray:
    """Regenerates the masked part of each image [n, s, s, 3] from its caption."""
    from tqdm import tqdm

    from dalle2_jax.evals import generation

    seeds = generation.seeds(shared.SEED.value, group.captions)
    rows = list(zip(true, group.captions, seeds, strict=True))
    return np.concatenate(
        [
            model.inpaint(image, edit_mask, caption, 1, seed, feather=feather)
            for image, caption, seed in tqdm(rows, desc=name, unit="image")
        ]
    )


def _extend_left_half(
    model: DALLE2, group: Group, true: np.ndarray, name: str, feather: int | None = None
) -> np.ndarray:
    """Extends the left half of each image [n, s, s, 3] to the right, to a full image again."""
    from tqdm import tqdm

    from dalle2_jax.evals import generation

    seeds = generation.seeds(shared.SEED.value, group.captions)
    rows = list(zip(true, group.captions, seeds, strict=True))
    size = model.image_size
    half = size // 2
    return np.concatenate(
        [
            model.outpaint(image[:, :half], caption, 1, seed, right=size - half, feather=feather)
            for image, caption, seed in tqdm(rows, desc=name, unit="image")
        ]
    )


def _constant(images: np.ndarray) -> Callable[[Group], np.ndarray]:
    """Returns a generator for `report.evaluate` whose images are there already."""
    return lambda _: images
