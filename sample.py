"""Draws pictures: python sample.py --prompt "a flat emoji of a red apple" --n 4 --out out

Every picture is written as a PNG that carries its prompt, seed and settings; grid.png shows all.
--topology=v5e:1x1 compiles the cascade for that TPU slice, draws nothing and tells what it needs
(docs/tpu.md); --weights=configs/paper then stands for the shapes of those configs.

Exit status: 0 done, 2 a mistake in the input, 3 too large for --topology, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from dalle2_jax.cli import commands  # first: it tells where no library is installed

# isort: split
from absl import flags

from dalle2_jax.cli import modes, sampling_flags, topology

SEED = flags.DEFINE_integer("seed", 0, "Picture i of a seed is always the same, but for rounding.")
OUT = flags.DEFINE_string("out", "out", "Folder for the pictures, or gs://BUCKET/FOLDER.")
WEIGHTS = flags.DEFINE_string("weights", "tiny", "'tiny', a folder (ours or Karlo's) or a hub id.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pictures drawn at a time.")
AUTO_BATCH = topology.only_with_topology("auto_batch", "the most pictures at a time that fit.")


def main() -> int:
    changes = sampling_flags.read()
    if topology.TOPOLOGY.value is not None:
        from dalle2_jax.aot import sampling

        asked = dict(batch_size=BATCH_SIZE.value, changes=changes, auto_batch=AUTO_BATCH.value)
        drawn = dict(size=modes.SIZE.value, prior=modes.PRIOR.value)
        return topology.tell(sampling.report, WEIGHTS.value, **asked, **drawn)
    topology.check()
    prompts = modes.prompts()
    # Late: a mistake in the flags and Ctrl-C are told at once.
    from dalle2_jax.cli import strips
    from dalle2_jax.cli.drawing import draw_prompts
    from dalle2_jax.imaging import files
    from dalle2_jax.pipelines.dalle2 import DALLE2

    commands.keep_compiled_programs()
    out = files.prepare_folder(OUT.value)
    if modes.PREVIEW_MASK.value:
        print(strips.preview(out))
        return 0
    told = prompts, modes.N.value, SEED.value, BATCH_SIZE.value, out
    generates = modes.MODE.value == modes.GENERATE
    model = DALLE2.from_pretrained(WEIGHTS.value, size=modes.SIZE.value)
    model = model.with_prior(modes.PRIOR.value).with_settings(**changes)
    if generates:
        print(draw_prompts(model, *told, modes.BEST_OF.value))
    else:
        print(strips.draw(model, *told, changes["steps"]))
    return 0


if __name__ == "__main__":
    commands.stop_at_once()
    commands.run(main)
