"""What the upsamplers add: dalle2 evals upsampling --data data/emoji_1024

Three tables of held-out pairs: PSNR against the true picture, beside bicubic upsampling of the same
small picture; a judge's scores of what is drawn, beside bicubic upsampling of the decoder's
pictures; each stage's cost. The judge reads pictures averaged down to its own size: it tells
whether a large one still shows what was asked for, and nothing of its fine detail, which PSNR does;
with --judge= none judges. Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a
mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared
from dalle2_jax.errors import UserError

NUM = flags.DEFINE_integer("num", 64, "Pictures.", 1)
flags.set_default(shared.DATA, "data/emoji_1024")
flags.set_default(shared.SIZE, 1024)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Pictures at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:
    from dalle2_jax.evals import cost, draw, psnr, report  # late: Ctrl-C is told at once

    commands.keep_compiled_programs()
    model = shared.load_model()
    if not model.cascade.upsamplers:
        raise UserError(f"--size={model.image_size} is drawn without an upsampler: give a larger")
    judge = shared.load_judge(model, BATCH_SIZE.value) if shared.JUDGE.value else None
    group, pool = shared.read_held_out_pairs(NUM.value)
    side, largest = group.pictures.shape[1], list(model.cascade.upsamplers.values())[-1].image_size
    if side % largest:
        raise UserError(
            f"{shared.DATA.value}: pictures of {side} px are no measure for those of {largest} px; "
            f"make some: dalle2 data emoji --size {largest} --out FOLDER"
        )

    print(psnr.table(model, group.pictures, BATCH_SIZE.value, shared.SEED.value), flush=True)
    if judge:
        small = model.at_size(model.cascade.decoder.image_size)
        same: Any = {"seed": shared.SEED.value, "batch_size": BATCH_SIZE.value}
        draws = {
            "upsampled": lambda group: draw.generate(model, group.captions, **same),
            "the decoder's, bicubic": lambda group: psnr.enlarged(
                draw.generate(small, group.captions, **same), model.image_size
            ),
        }
        scores, _ = report.evaluate(judge, [group], pool, draws, shared.SEED.value)
        print("\n" + report.to_markdown(scores), flush=True)
    print(cost.table(model, group.captions[: BATCH_SIZE.value], shared.SEED.value))
