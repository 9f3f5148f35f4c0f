"""How well parts are drawn anew: dalle2 evals inpainting --weights tiny

Of pictures of held-out pairs a part is erased and drawn again from the caption; a judge looks for
what was asked, in the whole and in the drawn part alone. A second table holds the seams: how far
colours change from the kept to the drawn part, beside how far they change within the two; as
pictures are drawn, without the feather, which hides a seam, and in the true ones. Needs the extra
`train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

OUT = flags.DEFINE_string("out", "out/evals_inpainting", "Folder for the pictures.")
NUM = flags.DEFINE_integer("num", 64, "Pictures.", 1)

prepare = commands.stop_at_once


def main() -> None:
    import numpy as np  # late: Ctrl-C is told at once
    from tqdm import tqdm

    from dalle2_jax.evals import draw, report, seams
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.imaging import files, grids
    from dalle2_jax.imaging.decode import crop_resize

    commands.keep_compiled_programs()
    out = files.prepare_folder(OUT.value)
    model = shared.load_model()
    judge = shared.load_judge(model)
    held_out, pool = shared.read_held_out_pairs(NUM.value)
    size = model.image_size
    given = np.stack([crop_resize(p, size, (1.0, 0.5, 0.5)) for p in held_out.pictures])

    seeds = draw.seeds(shared.SEED.value, held_out.captions)
    asked = list(zip(given, held_out.captions, seeds, strict=True))
    draws, lines, columns = {}, [], [given]

    def drawn_anew(name: str, **how: Any) -> np.ndarray:
        each = tqdm(asked, desc=name, unit="picture")
        return np.concatenate([model.inpaint(p, mask, t, 1, seed, **how) for p, t, seed in each])

    def continued(name: str, **how: Any) -> np.ndarray:
        each, half = tqdm(asked, desc=name, unit="picture"), size // 2
        told = {"right": size - half, **how}
        return np.concatenate(
            [model.outpaint(p[:, :half], t, 1, seed, **told) for p, t, seed in each]
        )

    def shown(made: np.ndarray) -> Callable[[Group], np.ndarray]:
        return lambda _: made

    for name, mask in seams.masks(size).items():
        drawn = drawn_anew(name)
        inside, paper = mask[..., None], np.full_like(given, 255)
        draws |= {
            f"{name}: drawn": shown(drawn),
            f"{name}: erased": shown(np.where(inside, paper, given)),
            f"{name}: the drawn part alone": shown(np.where(inside, drawn, paper)),
            f"{name}: that part, true": shown(np.where(inside, given, paper)),
        }
        sharp = drawn_anew(f"{name}, no feather", feather=0)
        lines.append((name, *(seams.across(p, mask) for p in (drawn, sharp, given))))
        columns += [np.where(inside, np.uint8(128), given), drawn]
    name, mask = "left half, continued", np.arange(size)[None].repeat(size, 0) >= size // 2
    drawn, sharp = continued(name), continued(f"{name}, no feather", feather=0)
    draws[name] = shown(drawn)
    lines.append((name, *(seams.across(p, mask) for p in (drawn, sharp, given))))
    columns.append(drawn)

    scores, _ = report.evaluate(judge, [held_out], pool, draws, shared.SEED.value)
    print(report.to_markdown(scores))
    print(seams.to_markdown(lines))
    grid = np.stack(columns, axis=1)[:12].reshape(-1, size, size, 3)
    files.save_png(out / "inpainting.png", grids.labelled_grid(grid, len(columns)))
    print(out / "inpainting.png")
