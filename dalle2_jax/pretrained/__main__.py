"""Imports a public model: python -m dalle2_jax.pretrained import SOURCE --out FOLDER

SOURCE is a folder that diffusers has saved: UnCLIPPipeline or UnCLIPImageVariationPipeline (Karlo),
or KandinskyV22PriorPipeline (a CLIP and a prior, to train a decoder on). Or it is a folder of
Karlo's own checkpoints (prior*.ckpt, decoder*.ckpt, improved-sr*.ckpt, ViT-L-14_stats.th), with
CLIP's text_encoder beside them as transformers saves it.

What comes out is a model folder for sample.py --weights. Exit status: 0 done, 2 a mistake in the
input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from pathlib import Path

from dalle2_jax import commands  # first: it tells where no library is installed

# isort: split
from absl import flags

from dalle2_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "The model folder to write; it must not be there yet.")


def main(_: str, source: str) -> None:
    if not OUT.value:
        raise UserError("--out is missing: name the model folder to write")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{source} is no folder: give the folder of a public model")
    from dalle2_jax.pretrained.convert import import_model  # late: mistakes are told at once

    import_model(folder, Path(OUT.value).expanduser())
    print(OUT.value)


if __name__ == "__main__":
    commands.run(main, words=("import", "SOURCE"))
