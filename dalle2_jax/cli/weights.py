"""Public weights: dalle2 weights import SOURCE --out FOLDER

SOURCE is a folder, a folder in a bucket or a hub id of what diffusers has saved: UnCLIPPipeline or
UnCLIPImageVariationPipeline (Karlo), or the prior's pipeline of Kandinsky 2.1 or 2.2 (a CLIP and a
prior, to train a decoder on). Or it is a folder of Karlo's own checkpoints (prior*.ckpt,
decoder*.ckpt, improved-sr*.ckpt, ViT-L-14_stats.th), with CLIP beside them: OpenAI's ViT-L-14.pt,
or text_encoder as transformers saves it. Or it is a CLIP alone, to train on: a folder of
transformers or OpenCLIP, or OpenAI's file, ViT-*.pt. docs/weights.md tells more.

What comes out is a model folder for sample.py --weights, which also takes SOURCE itself and keeps
what it makes of it in the user's cache. --dtype=bfloat16 stores it in half the space of float32:
TPUs compute in it anyway.

dalle2 weights export FOLDER --out PIPELINE is the way back, for a model folder of
such networks.

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

OUT = flags.DEFINE_string("out", None, "The folder to write; it must not be there yet.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "To import as; by default as it is there."
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
