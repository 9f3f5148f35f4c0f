"""What the upsamplers add: python -m dalle2_jax.evals.upsampling --data data/emoji_1024

Three tables of held-out pairs: PSNR against the true picture, beside bicubic upsampling of the same
small picture; a judge's scores of what is drawn, beside bicubic upsampling of the decoder's
pictures; each stage's cost. The judge reads pictures averaged down to its own size: it tells
whether a large one still shows what was asked for, and nothing of its fine detail, which PSNR does;
with --judge= none judges. Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a
mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from dalle2_jax.cli import commands  # first: it tells where no library is installed

# isort: split
from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.evals import common

NUM = flags.DEFINE_integer("num", 64, "Pictures.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Pictures at a time.", 1)


def main() -> None:
    from dalle2_jax.evals import cost, draw, psnr, report  # late: Ctrl-C is told at once

    commands.keep_compiled_programs()
    model = common.model()
    if not model.upsamplers:
        raise UserError(f"--size={model.image_size} is drawn without an upsampler: give a larger")
    judge = common.judge_of(model, BATCH_SIZE.value) if common.JUDGE.value else None
    group, pool = common.held_out_pairs(NUM.value)
    side, largest = group.pictures.shape[1], list(model.upsamplers.values())[-1].image_size
    if side % largest:
        raise UserError(
            f"{common.DATA.value}: pictures of {side} px are no measure for those of {largest} px; "
            f"make some: python -m dalle2_jax.data.emoji.write --size {largest} --out FOLDER"
        )

    print(psnr.table(model, group.pictures, BATCH_SIZE.value, common.SEED.value), flush=True)
    if judge:
        small = model.at_size(model.decoder.image_size)
        same: Any = {"seed": common.SEED.value, "batch_size": BATCH_SIZE.value}
        draws = {
            "upsampled": lambda group: draw.generate(model, group.captions, **same),
            "the decoder's, bicubic": lambda group: psnr.enlarged(
                draw.generate(small, group.captions, **same), model.image_size
            ),
        }
        scores, _ = report.evaluate(judge, [group], pool, draws, common.SEED.value)
        print("\n" + report.to_markdown(scores), flush=True)
    print(cost.table(model, group.captions[: BATCH_SIZE.value], common.SEED.value))


if __name__ == "__main__":
    flags.set_default(common.DATA, "data/emoji_1024")
    flags.set_default(common.SIZE, 1024)
    commands.stop_at_once()
    commands.run(main)
