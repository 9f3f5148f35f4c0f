"""What the upsamplers add: python -m dalle2_jax.evals.upsampling --data data/emoji_1024

Three tables of held-out pairs: PSNR against the true picture, beside bicubic upsampling of the same
small picture; a judge's scores of what is drawn, beside bicubic upsampling of the decoder's
pictures; each stage's cost. The judge reads pictures averaged down to its own size: it tells
whether a large one still shows what was asked for, and nothing of its fine detail, which PSNR does.
Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

from dalle2_jax import commands  # first: it tells where no library is installed

# isort: split
from absl import flags

from dalle2_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", "tiny", "'tiny', a model folder, or a hub id.")
SIZE = flags.DEFINE_integer("size", 1024, "Side of the largest pictures.")
JUDGE = flags.DEFINE_string(
    "judge", "runs/judge/model", "Model folder of a CLIP that only judges; empty: none judges."
)
DATA = flags.DEFINE_string("data", "data/emoji_1024", "The emoji set, at --size.")
SUBSET = flags.DEFINE_string(
    "subset",
    "concrete,group=animals-nature|food-drink|objects|smileys-emotion",
    "The records asked for; give what the model was trained on. Empty: all.",
)
NUM = flags.DEFINE_integer("num", 64, "Pictures.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the pairs and of all noise.", 0, 2**32 - 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Pictures at a time.", 1)


def main() -> None:
    from dalle2_jax.dalle2 import DALLE2  # late: Ctrl-C is told at once
    from dalle2_jax.evals import cost, draw, psnr, report
    from dalle2_jax.evals.groups import read_groups
    from dalle2_jax.evals.judge import Judge

    commands.keep_compiled_programs()
    judge = Judge.load(JUDGE.value, BATCH_SIZE.value) if JUDGE.value else None
    model = DALLE2.from_pretrained(WEIGHTS.value, size=SIZE.value)
    if not model.upsamplers:
        raise UserError(f"--size={SIZE.value}: {WEIGHTS.value} draws that without an upsampler")
    if judge and judge.is_clip(model.params["clip"]):
        raise UserError(f"--judge={JUDGE.value} is the CLIP that draws: it would judge itself")
    groups, pool = read_groups(DATA.value, SUBSET.value, NUM.value, SEED.value)
    (group,) = (group for group in groups if group.name == report.GRID_GROUP)
    side, largest = group.pictures.shape[1], list(model.upsamplers.values())[-1].image_size
    if side % largest:
        raise UserError(
            f"{DATA.value}: pictures of {side} px are no measure for those of {largest} px; "
            f"make some: python -m dalle2_jax.data.emoji --size {largest} --out FOLDER"
        )

    print(psnr.table(model, group.pictures, BATCH_SIZE.value, SEED.value), flush=True)
    if judge:
        small = model.at_size(model.decoder.image_size)
        same = {"seed": SEED.value, "batch_size": BATCH_SIZE.value, "progress": lambda _: None}
        draws = {
            "upsampled": lambda group: draw.generate(model, group.captions, **same),
            "the decoder's, bicubic": lambda group: psnr.enlarged(
                draw.generate(small, group.captions, **same), model.image_size
            ),
        }
        scores, _ = report.evaluate(judge, [group], pool, draws, SEED.value)
        print("\n" + report.to_markdown(scores), flush=True)
    print(cost.table(model, group.captions[: BATCH_SIZE.value], SEED.value))


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
