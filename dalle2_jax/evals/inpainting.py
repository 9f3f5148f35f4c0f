"""How well parts are drawn anew: python -m dalle2_jax.evals.inpainting --weights tiny

Of pictures of held-out pairs a part is erased and drawn again from the caption; a judge looks for
what was asked, in the whole and in the drawn part alone. A second table holds the seams: how far
colours change from the kept to the drawn part, beside how far they change within the two. Needs the
extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable

from dalle2_jax import commands  # first: it tells where no library is installed

# isort: split
from absl import flags

from dalle2_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", "tiny", "'tiny', a model folder, or a hub id.")
JUDGE = flags.DEFINE_string(
    "judge", "runs/judge/model", "Model folder of a CLIP that only judges (configs/clip.py:judge)."
)
DATA = flags.DEFINE_string("data", "data/emoji", "The emoji set, as `make data` writes it.")
SUBSET = flags.DEFINE_string(
    "subset",
    "concrete,group=animals-nature|food-drink|objects|smileys-emotion",
    "The records asked for; give what the model was trained on. Empty: all.",
)
OUT = flags.DEFINE_string("out", "out/evals_inpainting", "Folder for the pictures.")
NUM = flags.DEFINE_integer("num", 64, "Pictures.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the pairs and of all noise.", 0, 2**32 - 1)


def main() -> None:
    import numpy as np  # late: Ctrl-C is told at once
    from tqdm import tqdm

    from dalle2_jax import pictures
    from dalle2_jax.dalle2 import DALLE2
    from dalle2_jax.data.decode import crop_resize
    from dalle2_jax.evals import report, seams
    from dalle2_jax.evals.groups import Group, read_groups
    from dalle2_jax.evals.judge import Judge

    commands.keep_compiled_programs()
    out = pictures.prepare_folder(OUT.value)
    judge = Judge.load(JUDGE.value)
    model = DALLE2.from_pretrained(WEIGHTS.value)
    if judge.is_clip(model.params["clip"]):
        raise UserError(f"--judge={JUDGE.value} is the CLIP that draws: it would judge itself")
    groups, pool = read_groups(DATA.value, SUBSET.value, NUM.value, SEED.value)
    (held_out,) = (group for group in groups if group.name == report.GRID_GROUP)
    size = model.image_size
    given = np.stack([crop_resize(p, size, (1.0, 0.5, 0.5)) for p in held_out.pictures])

    draws, lines, columns = {}, [], [given]

    def shown(made: np.ndarray) -> Callable[[Group], np.ndarray]:
        return lambda _: made

    for name, mask in seams.masks(size).items():
        each = tqdm(list(zip(given, held_out.captions, strict=True)), desc=name, unit="picture")
        drawn = np.concatenate(
            [model.inpaint(picture, mask, text, 1, SEED.value) for picture, text in each]
        )
        inside, paper = mask[..., None], np.full_like(given, 255)
        draws |= {
            f"{name}: drawn": shown(drawn),
            f"{name}: erased": shown(np.where(inside, paper, given)),
            f"{name}: the drawn part alone": shown(np.where(inside, drawn, paper)),
            f"{name}: that part, true": shown(np.where(inside, given, paper)),
        }
        lines.append((name, seams.across(drawn, mask), seams.across(given, mask)))
        columns += [np.where(inside, np.uint8(128), given), drawn]

    half = size // 2
    each = tqdm(list(zip(given, held_out.captions, strict=True)), desc="continued", unit="picture")
    continued = np.concatenate(
        [
            model.outpaint(picture[:, :half], text, 1, SEED.value, right=size - half)
            for picture, text in each
        ]
    )
    mask = np.arange(size)[None].repeat(size, 0) >= half
    draws["left half, continued"] = shown(continued)
    lines.append(("left half, continued", *(seams.across(p, mask) for p in (continued, given))))
    columns.append(continued)

    scores, _ = report.evaluate(judge, [held_out], pool, draws, SEED.value)
    print(report.to_markdown(scores))
    print(seams.to_markdown(lines))
    grid = np.stack(columns, axis=1)[:12].reshape(-1, size, size, 3)
    pictures.save_png(out / "inpainting.png", pictures.labelled_grid(grid, len(columns)))
    print(out / "inpainting.png")


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
