"""Measures the upsamplers: dalle2 evals upsampling --data data/emoji_1024

Three tables of held-out pairs are printed: the PSNR of upsampled true images, beside bicubic
interpolation of the same small images; a judge's scores of generated images, beside bicubic
interpolation of the decoder's; the cost of each stage. The judge reads images averaged down to its
own size: it sees whether a large image still shows what its caption says, but not its fine detail,
which PSNR measures. With --judge= (empty) the second table is left out.

Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared
from dalle2_jax.errors import UserError

NUM = flags.DEFINE_integer("num", 64, "Number of images.", 1)
flags.set_default(shared.DATA, "data/emoji_1024")
flags.set_default(shared.SIZE, 1024)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Images generated at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    from dalle2_jax.evals import cost, generation, psnr, report

    commands.keep_compiled_programs()
    model = shared.load_model()
    upsamplers = model.cascade.upsamplers
    if not upsamplers:
        raise UserError(
            f"--size={model.image_size} is generated without an upsampler: give a larger size"
        )
    judge = shared.load_judge(model, BATCH_SIZE.value) if shared.JUDGE.value else None
    group, concepts = shared.read_held_out_pairs(NUM.value)
    side, largest = group.images.shape[1], list(upsamplers.values())[-1].image_size
    if side % largest:
        raise UserError(
            f"{shared.DATA.value}: images of {side} px are no reference for those of {largest} px; "
            f"render larger ones: dalle2 data emoji --size {largest} --out FOLDER"
        )

    seed, batch_size = shared.SEED.value, BATCH_SIZE.value
    print(psnr.table(model, group.images, batch_size, seed), flush=True)
    if judge:
        decoder_only = model.at_size(model.cascade.decoder.image_size)
        generators = {
            "upsampled": lambda group: generation.generate(model, group.captions, seed, batch_size),
            "the decoder's, bicubic": lambda group: psnr.enlarge(
                generation.generate(decoder_only, group.captions, seed, batch_size),
                model.image_size,
            ),
        }
        scores, _ = report.evaluate(judge, [group], concepts, generators, seed)
        print("\n" + report.to_markdown(scores), flush=True)
    print(cost.table(model, group.captions[:batch_size], seed))
