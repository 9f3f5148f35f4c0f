"""Imports or exports public weights.

    dalle2 weights import SOURCE --out FOLDER       public weights to a model folder
    dalle2 weights export FOLDER --out PIPELINE     a model folder to a pipeline of diffusers

SOURCE is a hub id, a folder or gs://BUCKET/FOLDER, with one of

    a pipeline that diffusers saved     UnCLIPPipeline or UnCLIPImageVariationPipeline (Karlo), or
                                        the prior of Kandinsky 2.1 or 2.2
    Karlo's own checkpoints             prior*.ckpt, decoder*.ckpt, improved-sr*.ckpt and
                                        ViT-L-14_stats.th, with CLIP beside them: OpenAI's
                                        ViT-L-14.pt, or text_encoder as transformers saves it
    a CLIP alone, to train on           of transformers or OpenCLIP; or OpenAI's file ViT-*.pt

`dalle2 generate --weights FOLDER` uses the imported folder. It also takes SOURCE itself, and then
imports it into the user's cache. export takes a folder whose networks diffusers has: an imported
one, or one that was fine-tuned from it. docs/weights.md has the details.

Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths

WORDS = ("VERB", "SOURCE")

OUT = flags.DEFINE_string("out", None, "The folder to write. It must not exist yet.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "(import) Type to store the weights in; bfloat16 takes half the space of float32. Default: as "
    "in SOURCE.",
)


def main(verb: str, source: str) -> None:
    if verb not in ("import", "export"):
        raise UserError(f"{verb!r} is unknown: write import SOURCE or export FOLDER")
    if not OUT.value:
        raise UserError("--out is missing: name the folder to write")
    if DTYPE.value and verb == "export":
        raise UserError("--dtype is for import: what is exported keeps its type")
    if paths.is_remote(OUT.value):
        raise UserError(f"--out={OUT.value}: name a folder of this machine, and copy it from there")
    out, dtype = Path(os.path.expanduser(OUT.value)), cast(Any, DTYPE.value)
    from dalle2_jax.pretrained import convert, export, find
    from dalle2_jax.storage import (  # late: mistakes in the flags are reported at once
        licence,
        model_names,
    )

    convert.check_free(out)  # before anything is downloaded
    if verb == "import":
        convert.import_model(find.source(source), out, dtype)
        licence.show_once(out)
    else:
        export.export_model(model_names.resolve(source), out)
    print(OUT.value)
