"""What becomes of given pictures, judged: dalle2 evals manipulations --weights tiny

Variations (unCLIP section 3.1): how often a judge finds in them what the given picture shows,
beside pictures drawn from its caption, and how far they are from it. Interpolations and text diffs
(3.2, 3.3) of pictures of held-out pairs: the judge's scores of what is left and of what is gone to,
step by step. Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the
input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

if TYPE_CHECKING:
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.pipelines.dalle2 import DALLE2

NUM = flags.DEFINE_integer("num", 100, "Pictures a group that are varied.", 2)
NUM_WAYS = flags.DEFINE_integer("num_ways", 32, "Pictures that go each way.", 2)
ETA = flags.DEFINE_multi_float("eta", [0.3, 0.6, 1.0], "Of variations.", 0, 1)
FRAMES = flags.DEFINE_integer("frames", 7, "Pictures of a way.", 2)
THETA = flags.DEFINE_float("theta", 0.5, "Of text diffs.", 0, 1)
STEPS = flags.DEFINE_integer("steps", 50, "Of the decoder.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Pictures at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:
    from dalle2_jax.evals import report, ways  # late: Ctrl-C is told at once
    from dalle2_jax.evals.groups import HELD_OUT
    from dalle2_jax.pipelines.edits import for_variations

    commands.keep_compiled_programs()
    model = shared.load_model()
    for_variations(model.cascade, 0.6, STEPS.value)  # too many steps are reported at once
    judge = shared.load_judge(model)
    groups, pool = shared.read_groups(NUM.value, "seen pairs", HELD_OUT)
    scores, drawn = report.evaluate(judge, groups, pool, _variations(model), shared.SEED.value)
    lines = [
        "| | concept first, % | style first, % | PSNR to the given picture, dB |",
        "|---|---|---|---|",
    ]
    for group in groups:
        lines += _rows(group, scores[group.name]["scores"], drawn[group.name])
    print("\n".join(lines), flush=True)

    given, _ = shared.read_held_out_pairs(NUM_WAYS.value)
    told = {"steps": STEPS.value, "batch_size": FRAMES.value}
    for way in ways.ways(model, given, FRAMES.value, THETA.value, shared.SEED.value, told):
        places = tqdm(range(len(given.pairs)), desc=way.name, unit="picture")
        frames = np.stack([way.draw(place) for place in places])
        print(f"\n{way.name}\n\n{ways.to_markdown(judge, frames, given.pairs, way)}", flush=True)


def _variations(model: DALLE2) -> dict[str, Callable[[Group], np.ndarray]]:
    from dalle2_jax.evals import draw

    size: Any = {"batch_size": BATCH_SIZE.value}
    told = {"steps": STEPS.value, **size}

    def varied(eta: float) -> Callable[[Group], np.ndarray]:
        def draws(group: Group) -> np.ndarray:
            seeds = draw.seeds(shared.SEED.value, group.captions)
            return model.variations(group.pictures, 1, seeds, eta=eta, **told)

        return draws

    return {
        "drawn from the caption": lambda group: draw.generate(
            model, group.captions, shared.SEED.value, **size
        ),
        "reconstructed": lambda group: model.reconstruct(group.pictures, **told),
        **{f"varied, eta {eta:g}": varied(eta) for eta in ETA.value},
    }


def _rows(group: Group, scores: Any, drawn: Mapping[str, np.ndarray]) -> Iterator[str]:
    import jax.numpy as jnp

    from dalle2_jax.evals.psnr import psnr
    from dalle2_jax.imaging import arrays

    given = arrays.to_float(jnp.asarray(group.pictures))
    for name, score in scores.items():
        cells = [
            f"{group.name}: {name}",
            *(f"{score[of]:.0f} ± {score[f'{of}_error']:.0f}" for of in ("concept", "style")),
        ]
        if name in drawn and not name.startswith("drawn"):
            made = arrays.to_float(jnp.asarray(drawn[name]))
            near = psnr(made, arrays.resize(given, made.shape[1], "area"))
            cells.append(f"{near.mean():.1f}")
        yield f"| {' | '.join(cells)} |" + " |" * (4 - len(cells))
