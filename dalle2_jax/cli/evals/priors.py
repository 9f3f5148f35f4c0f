"""The paper's ablation of priors: dalle2 evals priors --weights FOLDER --judge JUDGE

Pictures of the same captions, from the same noise, under the z_img that each prior of the folder
draws, under z_txt in its place, and under the true one: a table is printed (unCLIP section 5.1 and
figure 8). Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the
input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

NUM = flags.DEFINE_integer("num", 200, "Pictures a group.", 2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Pictures drawn at a time.", 1)

TRUE = "the true z_img"

prepare = commands.stop_at_once


def main() -> None:
    import numpy as np  # late: Ctrl-C is told at once

    from dalle2_jax.evals import draw, report
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.evals.priors import to_markdown
    from dalle2_jax.pipelines.embeddings import normalise
    from dalle2_jax.sampling.priors import NAMES

    commands.keep_compiled_programs()
    model = shared.load_model()
    judge = shared.load_judge(model)
    groups, pool = shared.read_groups(NUM.value)
    priors = [
        name for name, stage in NAMES.items() if stage in model.cascade.priors or name == "none"
    ]
    cosines: dict[tuple[str, str], float] = {}
    same: Any = {"seed": shared.SEED.value, "batch_size": BATCH_SIZE.value}

    def drawn_by(name: str, group: Group, bar: tqdm) -> np.ndarray:
        true = model.encode_image(group.pictures)
        z_img = true
        if name != TRUE:
            seeds = draw.seeds(shared.SEED.value, group.captions)
            z_img = model.with_prior(name).sample_prior(
                group.captions, seed=seeds, batch_size=BATCH_SIZE.value
            )
        found = np.sum(normalise(z_img) * normalise(true), axis=1)
        cosines[group.name, name] = float(found.mean())
        told: Any = {**same, "progress": bar.update}
        return draw.generate(model, group.captions, **told, z_img=z_img)

    total = (len(priors) + 1) * sum(len(group.pairs) for group in groups)
    with tqdm(total=total, desc="drawing", unit="picture") as bar:
        draws = {
            name: lambda group, name=name: drawn_by(name, group, bar) for name in (*priors, TRUE)
        }
        scores, _ = report.evaluate(judge, groups, pool, draws, shared.SEED.value)
    print(to_markdown(scores, cosines))
