"""Which solver, in how many steps: dalle2 evals solvers --weights tiny

A stage at a time is drawn by every solver in a few numbers of steps, the others as the folder says;
the same captions of held-out pairs and the same noise each time. A table of the network's
evaluations, the Frechet distance to the true pictures and how often a judge finds what was asked;
beside them DDPM in 250 steps, the reference. The fewest evaluations whose distance is within 5 % of
that are marked; of several, those in which the judge finds most. Needs the extra `train` (it reads
a data set). Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared
from dalle2_jax.errors import UserError, near_miss

STAGES = flags.DEFINE_list("stages", [], "Which; all that denoise, unless told.")
SOLVERS = flags.DEFINE_list("solvers", [], "Which; all, unless told.")
STEPS = flags.DEFINE_multi_integer("steps", [5, 8, 12, 20], "Of each solver.", 1)
REFERENCE = flags.DEFINE_integer("reference", 250, "Steps of DDPM.", 1)
NUM = flags.DEFINE_integer("num", 100, "Pictures.", 2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Pictures drawn at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:
    from tqdm import tqdm  # late: Ctrl-C is told at once

    from dalle2_jax.diffusion import solvers
    from dalle2_jax.evals import draw, report
    from dalle2_jax.evals.solvers import Case, to_markdown
    from dalle2_jax.sampling.stage import StageSampler

    commands.keep_compiled_programs()
    model = shared.load_model()
    judge = shared.load_judge(model)
    known = [name for name, s in model.cascade.samplers().items() if isinstance(s, StageSampler)]
    stages, names = STAGES.value or known, SOLVERS.value or solvers.NAMES
    for name in names:
        solvers.check_name(name)
    for stage in stages:
        if stage not in known:
            raise UserError(f"--stages={stage}: there is no such{near_miss(stage, known)}")
    group, pool = shared.read_held_out_pairs(NUM.value)

    def case(stage: str, solver: str, steps: int) -> Case:
        drawing = model.with_settings(steps={stage: steps}, solver={stage: solver})
        told: Any = {"seed": shared.SEED.value, "batch_size": BATCH_SIZE.value}
        draws = {"drawn": lambda group: draw.generate(drawing, group.captions, **told)}
        scores, _ = report.evaluate(judge, [group], pool, draws, shared.SEED.value)
        found = scores[group.name]["scores"]["drawn"]
        return Case(
            solver,
            steps,
            drawing.cascade.samplers()[stage].evaluations,
            found["frechet_distance"],
            found["concept"],
            found["concept_error"],
        )

    asked: list[Any] = [("ddpm", REFERENCE.value)]
    asked += [(name, steps) for name in names for steps in STEPS.value]
    # What cannot be drawn is told before an hour is gone.
    for stage in stages:
        for solver, steps in asked:
            model.with_settings(steps={stage: steps}, solver={stage: solver})
    for stage in stages:
        cases = [case(stage, *one) for one in tqdm(asked, desc=stage, unit="case")]
        print(f"\n{stage}\n\n{to_markdown(cases)}", flush=True)
