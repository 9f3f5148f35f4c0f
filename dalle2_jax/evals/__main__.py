"""Judges a model: python -m dalle2_jax.evals --weights tiny --judge runs/judge/model --out DIR

Writes report.json, report.md (a table) and held_out_pairs.png (drawn beside true pictures).
Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

from dalle2_jax.cli import commands  # first: it tells where no library is installed

# isort: split
from absl import flags
from tqdm import tqdm

from dalle2_jax.errors import UserError
from dalle2_jax.evals import common
from dalle2_jax.version import __version__

OUT = flags.DEFINE_string("out", "out/evals", "Folder for the report.")
NUM = flags.DEFINE_integer(
    "num", 100, "Pictures a group (seen, held-out pairs, held-out concepts)."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pictures drawn at a time.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps of the decoder.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance of the decoder; 1 is off.")
SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddpm, ddim, dpm++, dpm++3m, dpm++sde, unipc or heun."
)
RECONSTRUCT = flags.DEFINE_bool(
    "reconstruct", False, "Also draw from the true pictures' z_img: what the decoder alone loses."
)


def main() -> None:
    for flag in (NUM, BATCH_SIZE):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be 1 or more")
    # Late: a mistake in the flags and Ctrl-C are told at once.
    from dalle2_jax.evals import draw, report
    from dalle2_jax.evals.groups import HELD_OUT
    from dalle2_jax.imaging import files

    commands.keep_compiled_programs()
    out = files.prepare_folder(OUT.value)
    model = common.model().with_settings(STEPS.value, CFG_SCALE.value, SAMPLER.value)
    judge = common.judge_of(model)
    groups, pool = common.groups(NUM.value)

    passes = 2 if RECONSTRUCT.value else 1
    total = passes * sum(len(group.pairs) for group in groups)
    with tqdm(total=total, desc="drawing", unit="picture") as bar:
        same = {"seed": common.SEED.value, "batch_size": BATCH_SIZE.value, "progress": bar.update}
        draws = {"generated": lambda group: draw.generate(model, group.captions, **same)}
        if RECONSTRUCT.value:
            draws["from the true z_img"] = lambda group: draw.generate(
                model, group.captions, **same, z_img=model.encode_image(group.pictures)
            )
        scores, drawn = report.evaluate(judge, groups, pool, draws, common.SEED.value)
    about = {
        "version": __version__,
        "weights": {"name": model.weights, "hash": model.weights_hash},
        "judge": {"name": common.JUDGE.value, "hash": judge.weights_hash},
        "data": {"path": common.DATA.value, "subset": common.SUBSET.value, "concepts": len(pool)},
        "num": NUM.value,
        "seed": common.SEED.value,
        "settings": model.settings(),
    }
    group = next(group for group in groups if group.name == HELD_OUT)
    grid = report.held_out_grid(group, drawn[group.name]["generated"])
    report.write(out, about, scores, grid)
    print(report.to_markdown(scores))
    print(out / "report.md")


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
