"""The paper's ablation of priors: python -m dalle2_jax.evals.priors --weights FOLDER --judge JUDGE

Pictures of the same captions, from the same noise, under the z_img that each prior of the folder
draws, under z_txt in its place, and under the true one: a table is printed (unCLIP section 5.1 and
figure 8). Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the
input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle2_jax.cli import commands  # first: it tells where no library is installed

# isort: split
from absl import flags
from tqdm import tqdm

from dalle2_jax.evals import common

NUM = flags.DEFINE_integer("num", 200, "Pictures a group.", 2)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Pictures drawn at a time.", 1)

TRUE = "the true z_img"
_ROWS = {"diffusion": "diffusion prior", "ar": "AR prior", "none": "no prior (z_txt)"}
_COLUMNS = ("concept first, %", "style first, %", "CLIP score", "Frechet distance", "KID")


def main() -> None:
    import numpy as np  # late: Ctrl-C is told at once

    from dalle2_jax.evals import draw, report
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.pipelines.embeddings import normalise
    from dalle2_jax.sampling.priors import NAMES

    commands.keep_compiled_programs()
    model = common.model()
    judge = common.judge_of(model)
    groups, pool = common.groups(NUM.value)
    priors = [name for name, stage in NAMES.items() if stage in model.priors or name == "none"]
    cosines: dict[tuple[str, str], float] = {}
    same: Any = {"seed": common.SEED.value, "batch_size": BATCH_SIZE.value}

    def drawn_by(name: str, group: Group, bar: tqdm) -> np.ndarray:
        true = model.encode_image(group.pictures)
        z_img = true
        if name != TRUE:
            seeds = draw.seeds(common.SEED.value, group.captions)
            asked: Any = {"prior": name, "batch_size": BATCH_SIZE.value}
            z_img = model.sample_prior(group.captions, seed=seeds, **asked)
        found = np.sum(normalise(z_img) * normalise(true), axis=1)
        cosines[group.name, name] = float(found.mean())
        told: Any = {**same, "progress": bar.update}
        return draw.generate(model, group.captions, **told, z_img=z_img)

    total = (len(priors) + 1) * sum(len(group.pairs) for group in groups)
    with tqdm(total=total, desc="drawing", unit="picture") as bar:
        draws = {
            name: lambda group, name=name: drawn_by(name, group, bar) for name in (*priors, TRUE)
        }
        scores, _ = report.evaluate(judge, groups, pool, draws, common.SEED.value)
    print(to_markdown(scores, cosines))


def to_markdown(scores: Mapping[str, Any], cosines: Mapping[tuple[str, str], float]) -> str:
    """The table: a line a group and prior. `scores` as `report.evaluate` gives them."""
    head = ("", "n", "cosine to the true z_img", *_COLUMNS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group, found in scores.items():
        for name, score in found["scores"].items():
            cosine = cosines.get((group, name))
            cells = [
                f"{group}: {_ROWS.get(name, name)}",
                str(found["pairs"]),
                "" if cosine is None else f"{cosine:.3f}",
                f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
                f"{score['style']:.0f} ± {score['style_error']:.0f}",
                f"{score['clip_score']:.1f}",
                f"{score['frechet_distance']:.1f}",
                f"{score['kernel_distance']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    k = max(found["candidates"] for found in scores.values())
    return "\n".join(lines) + (
        f"\n\nConcept first of {k} and the distances by a judge CLIP that took no part in drawing, "
        "as of\n`dalle2_jax.evals`; the cosine by the CLIP that draws.\n"
    )


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
