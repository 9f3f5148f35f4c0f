"""Flags of generating images: what is asked for, with which model, and where it is written.

Nothing that takes time is imported here, so mistakes in the flags are reported, and Ctrl-C works,
at once.
"""

from __future__ import annotations

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths

PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "What the image is to show; may be given several times."
)
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file with one prompt a line.")
N = flags.DEFINE_integer("n", 4, "Images for each prompt.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all noise: image i of a seed is always the same, but for rounding."
)
OUT = flags.DEFINE_string("out", "out", "Folder for the images, or gs://BUCKET/FOLDER.")
WEIGHTS = flags.DEFINE_string(
    "weights", "tiny", "'tiny', a model folder, a folder of Karlo's, or a hub id."
)
SIZE = flags.DEFINE_integer(
    "size", None, "Side of the images in pixels, as 128, 512 or 1024. Default: the model's."
)
PRIOR = flags.DEFINE_enum(
    "prior",
    None,
    ["diffusion", "ar", "none"],
    "The prior that turns a prompt into z_img; none decodes z_txt in its place.",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images generated at a time.")
BEST_OF = flags.DEFINE_integer(
    "best_of", None, "Generate so many for each prompt and keep the --n nearest to it by CLIP.", 1
)
LIKE = flags.DEFINE_string(
    "like", None, "A PNG that this program wrote: generate it again. Other flags override."
)


def read_prompts() -> list[str]:
    """Returns the prompts of --prompt and --prompts_file; raises UserError."""
    texts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        try:
            file = paths.to_path(PROMPTS_FILE.value)
            with paths.as_user_error("cannot read", file):
                text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file={PROMPTS_FILE.value}: {error}") from error
        texts += [line.strip() for line in text.splitlines() if line.strip()]
    return texts
