"""Compares solvers and numbers of steps: dalle2 evals solvers --weights tiny

One stage at a time is sampled by every solver in a few numbers of steps, and the other stages as
the folder says, always from the same captions of held-out pairs and the same noise. A table for
each stage shows the network's evaluations, the Frechet distance to the true images and how often a
judge finds the concept, beside DDPM in 250 steps, the reference. The case with the fewest
evaluations whose distance is within 5 % of the reference's is marked; of several, the one in which
the judge finds most.

Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared
from dalle2_jax.errors import UserError, near_miss

if TYPE_CHECKING:
    import numpy as np

    from dalle2_jax.evals.groups import Group
    from dalle2_jax.pipelines.dalle2 import DALLE2

STAGES = flags.DEFINE_list(
    "stages", [], "Stages to sample by each solver. Default: all diffusion stages."
)
SOLVERS = flags.DEFINE_list("solvers", [], "Solvers to compare. Default: all.")
STEPS = flags.DEFINE_multi_integer(
    "steps", [5, 8, 12, 20], "Sampling steps of each solver; may be repeated.", 1
)
REFERENCE = flags.DEFINE_integer("reference", 250, "Sampling steps of DDPM, the reference.", 1)
NUM = flags.DEFINE_integer("num", 100, "Images per case.", 2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Images generated at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    from tqdm import tqdm

    from dalle2_jax.diffusion import solvers
    from dalle2_jax.evals import generation, report
    from dalle2_jax.evals.solvers import Case, to_markdown

    commands.keep_compiled_programs()
    model = shared.load_model()
    judge = shared.load_judge(model)
    stages, names = _stages(model), SOLVERS.value or solvers.NAMES
    for name in names:
        solvers.check_name(name)
    group, concepts = shared.read_held_out_pairs(NUM.value)

    def evaluate(stage: str, solver: str, steps: int) -> Case:
        changed = model.with_settings(steps={stage: steps}, solver={stage: solver})

        def generate(group: Group) -> np.ndarray:
            return generation.generate(changed, group.captions, shared.SEED.value, BATCH_SIZE.value)

        scores, _ = report.evaluate(
            judge, [group], concepts, {"generated": generate}, shared.SEED.value
        )
        score = scores[group.name]["scores"]["generated"]
        return Case(
            solver,
            steps,
            changed.cascade.samplers()[stage].evaluations,
            score["frechet_distance"],
            score["concept"],
            score["concept_error"],
        )

    cases = [("ddpm", REFERENCE.value)]
    cases += [(name, steps) for name in names for steps in STEPS.value]
    # A case that cannot be sampled is reported now, not after an hour.
    for stage in stages:
        for solver, steps in cases:
            model.with_settings(steps={stage: steps}, solver={stage: solver})
    for stage in stages:
        results = [evaluate(stage, *case) for case in tqdm(cases, desc=stage, unit="case")]
        print(f"\n{stage}\n\n{to_markdown(results)}", flush=True)


def _stages(model: DALLE2) -> list[str]:
    """Returns the stages of --stages, or all whose sampler takes denoising steps."""
    from dalle2_jax.sampling.stage import StageSampler

    samplers = model.cascade.samplers()
    denoising = [name for name, s in samplers.items() if isinstance(s, StageSampler)]
    for stage in STAGES.value:
        if stage not in denoising:
            raise UserError(
                f"--stages={stage}: there is no such stage{near_miss(stage, denoising)}"
            )
    return STAGES.value or denoising
