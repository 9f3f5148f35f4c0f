"""How well pictures are kept: dalle2 evals inversion --weights tiny

Pictures of held-out pairs are inverted and drawn again by the decoder alone; a table of the PSNR at
its resolution is printed; nobody judges. Needs the extra `train` (it reads a data set). Exit
status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from tqdm import tqdm

from dalle2_jax.cli import commands
from dalle2_jax.cli.evals import flags as shared

NUM = flags.DEFINE_integer("num", 32, "Pictures.", 1)
STEPS = flags.DEFINE_multi_integer("steps", [250, 100, 50, 25], "Of the decoder, each way.")
ITERATIONS = flags.DEFINE_multi_integer("iterations", [1, 2], "Of a step of the inversion.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures at a time.", 1)

prepare = commands.stop_at_once


def main() -> None:

    import jax.numpy as jnp
    import numpy as np

    from dalle2_jax.imaging import arrays

    commands.keep_compiled_programs()
    model = shared.load_model()
    model = model.at_size(model.cascade.decoder.image_size)
    held_out, _ = shared.read_held_out_pairs(NUM.value)
    pixels = arrays.to_float(jnp.asarray(held_out.pictures))
    given = arrays.resize(pixels, model.image_size, "area")
    given = np.asarray(arrays.to_uint8(given)).astype(float)

    lines = [
        "| steps | iterations | PSNR, dB | worst | deviation of x_T |",
        "|---|---|---|---|---|",
    ]
    cases = [(steps, iterations) for steps in STEPS.value for iterations in ITERATIONS.value]
    for steps, iterations in tqdm(cases, unit="case"):
        same: Any = {"steps": steps, "batch_size": BATCH_SIZE.value}
        latents = model.invert(held_out.pictures, iterations=iterations, **same)
        error = model.decode(latents, **same) - given
        psnr = 20 * np.log10(255 / np.sqrt((error**2).mean(axis=(1, 2, 3))))
        cells = steps, iterations, f"{psnr.mean():.1f}", f"{psnr.min():.1f}"
        lines.append(f"| {' | '.join(map(str, (*cells, f'{latents.x_T.std():.2f}')))} |")
    print("\n".join(lines))
