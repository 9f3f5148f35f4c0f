"""Compares a folder's priors: dalle2 evals priors --weights FOLDER --judge JUDGE

Images of the same captions are generated from the same noise and from different z_img: those that
each prior of the folder samples, z_txt in their place, and the true images' own. A table of the
judge's scores is printed (unCLIP section 5.1 and figure 8). Needs the extra `train` (it reads a
data set). Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

NUM = flags.DEFINE_integer("num", 200, "Images per group.", 2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Images generated at a time.", 1)

TRUE = "the true z_img"  # a row of the table

prepare = commands.stop_at_once


def main() -> None:
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    import numpy as np

    from dalle2_jax.evals import generation, report
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.evals.priors import to_markdown
    from dalle2_jax.pipelines.embeddings import normalise
    from dalle2_jax.sampling.priors import NAMES

    commands.keep_compiled_programs()
    model = shared.load_model()
    judge = shared.load_judge(model)
    groups, concepts = shared.read_groups(NUM.value)
    priors = [
        name for name, stage in NAMES.items() if stage in model.cascade.priors or name == "none"
    ]
    cosines: dict[tuple[str, str], float] = {}

    def generate(name: str, group: Group, bar: tqdm) -> np.ndarray:
        true = model.encode_image(group.images)
        if name == TRUE:
            z_img = true
        else:
            seeds = generation.seeds(shared.SEED.value, group.captions)
            z_img = model.with_prior(name).sample_prior(
                group.captions, seed=seeds, batch_size=BATCH_SIZE.value
            )
        cosine = np.sum(normalise(z_img) * normalise(true), axis=1)
        cosines[group.name, name] = float(cosine.mean())
        return generation.generate(
            model, group.captions, shared.SEED.value, BATCH_SIZE.value, bar.update, z_img
        )

    total = (len(priors) + 1) * sum(len(group.pairs) for group in groups)
    with tqdm(total=total, desc="generating", unit="image") as bar:
        generators = {
            name: lambda group, name=name: generate(name, group, bar) for name in (*priors, TRUE)
        }
        scores, _ = report.evaluate(judge, groups, concepts, generators, shared.SEED.value)
    print(to_markdown(scores, cosines))
