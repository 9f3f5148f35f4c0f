"""Judges edited images: dalle2 evals manipulations --weights tiny

Variations (unCLIP section 3.1): how often a judge finds in them the concept and the style of the
original image, beside images generated from its caption, and their PSNR to the original.
Interpolations and text diffs (sections 3.2 and 3.3) of held-out pairs: the judge's scores of both
ends, frame by frame.

Needs the extra `train` (it reads a data set). Exit status: 0 done, 2 a mistake in the input, 130
stopped by Ctrl-C.
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

NUM = flags.DEFINE_integer("num", 100, "Images per group for the table of variations.", 2)
NUM_TRANSITIONS = flags.DEFINE_integer(
    "num_transitions", 32, "Images for each table of interpolations and text diffs.", 2
)
ETA = flags.DEFINE_multi_float(
    "eta", [0.3, 0.6, 1.0], "DDIM's noise in variations; may be repeated.", 0, 1
)
FRAMES = flags.DEFINE_integer(
    "frames", 7, "Number of images of an interpolation or a text diff.", 2
)
THETA = flags.DEFINE_float("theta", 0.5, "Share of the angle that text diffs turn.", 0, 1)
STEPS = flags.DEFINE_integer("steps", 50, "Sampling steps of the decoder.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Images generated at a time.", 1)

_FROM_CAPTION = "generated from the caption"

prepare = commands.stop_at_once


def main() -> None:
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    from dalle2_jax.evals import report, transitions
    from dalle2_jax.evals.groups import HELD_OUT
    from dalle2_jax.pipelines.edits import for_variations

    commands.keep_compiled_programs()
    model = shared.load_model()
    for_variations(model.cascade, 0.6, STEPS.value)  # raises UserError for too many steps, early
    judge = shared.load_judge(model)
    groups, concepts = shared.read_groups(NUM.value, "seen pairs", HELD_OUT)
    scores, images = report.evaluate(
        judge, groups, concepts, _variation_generators(model), shared.SEED.value
    )
    lines = [
        "| | concept first, % | style first, % | PSNR to the original, dB |",
        "|---|---|---|---|",
    ]
    for group in groups:
        lines += _rows(group, scores[group.name]["scores"], images[group.name])
    print("\n".join(lines), flush=True)

    group, _ = shared.read_held_out_pairs(NUM_TRANSITIONS.value)
    for transition in transitions.transitions(
        model, group, FRAMES.value, THETA.value, shared.SEED.value, STEPS.value
    ):
        indices = tqdm(range(len(group.pairs)), desc=transition.name, unit="image")
        frames = np.stack([transition.generate(i) for i in indices])
        table = transitions.to_markdown(judge, frames, group.pairs, transition)
        print(f"\n{transition.name}\n\n{table}", flush=True)


def _variation_generators(model: DALLE2) -> dict[str, Callable[[Group], np.ndarray]]:
    """Returns the rows of the table of variations: {name: generator of a group's images}."""
    from dalle2_jax.evals import generation

    def vary(eta: float) -> Callable[[Group], np.ndarray]:
        def generate(group: Group) -> np.ndarray:
            seeds = generation.seeds(shared.SEED.value, group.captions)
            return model.variations(
                group.images, 1, seeds, eta=eta, steps=STEPS.value, batch_size=BATCH_SIZE.value
            )

        return generate

    return {
        _FROM_CAPTION: lambda group: generation.generate(
            model, group.captions, shared.SEED.value, BATCH_SIZE.value
        ),
        "reconstructed": lambda group: model.reconstruct(
            group.images, steps=STEPS.value, batch_size=BATCH_SIZE.value
        ),
        **{f"variation, eta {eta:g}": vary(eta) for eta in ETA.value},
    }


def _rows(
    group: Group, scores: Mapping[str, Any], images: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Yields the lines of the table; PSNR only of images that come from the original."""
    import jax.numpy as jnp

    from dalle2_jax.evals.psnr import psnr
    from dalle2_jax.imaging import arrays

    true = arrays.to_float(jnp.asarray(group.images))
    for name, score in scores.items():
        psnr_cell = ""
        if name in images and name != _FROM_CAPTION:
            generated = arrays.to_float(jnp.asarray(images[name]))
            values = psnr(generated, arrays.resize(true, generated.shape[1], "area"))
            psnr_cell = f"{values.mean():.1f}"
        cells = [
            f"{group.name}: {name}",
            f"{score['concept']:.0f} ± {score['concept_error']:.0f}",
            f"{score['style']:.0f} ± {score['style_error']:.0f}",
            psnr_cell,
        ]
        yield f"| {' | '.join(cells)} |"
