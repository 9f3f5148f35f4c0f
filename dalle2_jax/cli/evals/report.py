"""Judges a model: dalle2 evals report --weights tiny --judge runs/judge/model --out DIR

Generates images of seen pairs, held-out pairs and held-out concepts, and scores them: how often a
judge finds the concept and the style, CLIP score, Frechet distance and KID. Writes report.json,
report.md (a table) and held_out_pairs.png (generated images beside the true ones). Needs the extra
`train` (it reads a data set).
Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared
from dalle2_jax.errors import UserError
from dalle2_jax.version import __version__

OUT = flags.DEFINE_string("out", "out/evals", "Folder for the report.")
NUM = flags.DEFINE_integer(
    "num", 100, "Images per group (seen pairs, held-out pairs, held-out concepts)."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images generated at a time.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps of the decoder.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale of the decoder; 1 is off.")
SAMPLER = flags.DEFINE_string(
    "sampler", None, "Solver of all stages: ddpm, ddim, dpm++, dpm++3m, dpm++sde, unipc or heun."
)
RECONSTRUCT = flags.DEFINE_bool(
    "reconstruct", False, "Also decode the true images' z_img: shows what the decoder alone loses."
)

prepare = commands.stop_at_once


def main() -> None:
    for flag in (NUM, BATCH_SIZE):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be 1 or more")
    # Late, so that mistakes in the flags are reported at once.
    from dalle2_jax.evals import generation, report
    from dalle2_jax.evals.groups import HELD_OUT
    from dalle2_jax.storage import paths

    commands.keep_compiled_programs()
    out = paths.prepare_folder(OUT.value)
    model = shared.load_model().with_settings(STEPS.value, CFG_SCALE.value, SAMPLER.value)
    judge = shared.load_judge(model)
    groups, concepts = shared.read_groups(NUM.value)

    passes = 2 if RECONSTRUCT.value else 1
    total = passes * sum(len(group.pairs) for group in groups)
    with tqdm(total=total, desc="generating", unit="image") as bar:
        generators = {
            "generated": lambda group: generation.generate(
                model, group.captions, shared.SEED.value, BATCH_SIZE.value, bar.update
            )
        }
        if RECONSTRUCT.value:
            generators["from the true z_img"] = lambda group: generation.generate(
                model,
                group.captions,
                shared.SEED.value,
                BATCH_SIZE.value,
                bar.update,
                model.encode_image(group.images),
            )
        scores, images = report.evaluate(judge, groups, concepts, generators, shared.SEED.value)
    about = {
        "version": __version__,
        "weights": {"name": model.weights, "hash": model.weights_hash},
        "judge": {"name": shared.JUDGE.value, "hash": judge.weights_hash},
        "data": {
            "path": shared.DATA.value,
            "subset": shared.SUBSET.value,
            "concepts": len(concepts),
        },
        "num": NUM.value,
        "seed": shared.SEED.value,
        "settings": model.settings(),
    }
    group = next(group for group in groups if group.name == HELD_OUT)
    grid = report.held_out_grid(group, images[group.name]["generated"])
    report.write(out, about, scores, grid)
    print(report.to_markdown(scores))
    print(out / "report.md")
