"""Measures reconstruction: dalle2 evals inversion --weights tiny

Images of held-out pairs are inverted, and decoded again by the decoder alone. A table of the PSNR
at the decoder's resolution is printed; it needs no judge. Needs the extra `train` (it reads a data
set). Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

NUM = flags.DEFINE_integer("num", 32, "Number of images.", 1)
STEPS = flags.DEFINE_multi_integer(
    "steps", [250, 100, 50, 25], "Decoder steps, to invert and to decode; may be repeated."
)
ITERATIONS = flags.DEFINE_multi_integer(
    "iterations", [1, 2], "Network evaluations in each step of the inversion; may be repeated."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images inverted at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:

    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    import jax.numpy as jnp
    import numpy as np

    from dalle2_jax.imaging import arrays

    commands.keep_compiled_programs()
    model = shared.load_model()
    model = model.at_size(model.cascade.decoder.image_size)
    group, _ = shared.read_held_out_pairs(NUM.value)
    pixels = arrays.to_float(jnp.asarray(group.images))
    true = arrays.to_uint8(arrays.resize(pixels, model.image_size, "area"))
    true = np.asarray(true).astype(float)

    lines = [
        "| steps | iterations | PSNR, dB | worst | std of x_T |",
        "|---|---|---|---|---|",
    ]
    cases = [(steps, iterations) for steps in STEPS.value for iterations in ITERATIONS.value]
    for steps, iterations in tqdm(cases, unit="case"):
        latents = model.invert(
            group.images, steps=steps, iterations=iterations, batch_size=BATCH_SIZE.value
        )
        decoded = model.decode(latents, steps=steps, batch_size=BATCH_SIZE.value)
        error = ((decoded - true) ** 2).mean(axis=(1, 2, 3))
        psnr = 20 * np.log10(255 / np.sqrt(error))
        cells = [
            str(steps),
            str(iterations),
            f"{psnr.mean():.1f}",
            f"{psnr.min():.1f}",
            f"{latents.x_T.std():.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
