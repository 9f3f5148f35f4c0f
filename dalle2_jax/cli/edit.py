"""Edits images: dalle2 edit --mode variations --image a.png --n 4 --out out

    --mode reconstruct  --image A             invert and decode again
    --mode variations   --image A             keep what z_img holds, sample the rest again
    --mode interpolate  --image A --image B   from one to the other; or --image A --prompt "..."
    --mode text_diff    --image A --prompt "..."            turn it towards a text
    --mode probe        --image A             decode 20, 40, ... principal directions of its z_img
    --mode inpaint      --image A --mask M --prompt "..."   regenerate a part
    --mode outpaint     --image A --right 64 --prompt "..." extend it beyond its sides

z_img is CLIP's embedding of an image. Every image is written as a PNG that carries how it was
generated; MODE.png shows all. docs/editing.md explains the modes, and which flags each takes.
--like FILE.png repeats the edit of such a file.
Exit status: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from absl import flags

from dalle2_jax.cli import commands, edit_flags, generate_flags, request
from dalle2_jax.errors import UserError

MODE = flags.DEFINE_enum("mode", None, edit_flags.MODE_NAMES, "The kind of edit; see above.")

prepare = commands.stop_at_once


def main() -> int:
    """Edits by the flags and returns the exit status."""
    if MODE.value is None and generate_flags.LIKE.value is None:
        raise UserError(f"--mode is missing: one of {', '.join(edit_flags.MODE_NAMES)}")
    return request.main(MODE.value, edit_flags.MODE_NAMES)
