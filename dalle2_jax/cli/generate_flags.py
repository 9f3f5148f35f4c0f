"""Flags of generating images: what to generate, with which model, and where to write it.

`dalle2 edit` has them too; in brackets stands which modes a flag is for, if not for all.
Nothing that takes time is imported here, so mistakes in the flags are reported, and Ctrl-C works,
at once.
"""

from __future__ import annotations

from absl import flags

from dalle2_jax.errors import UserError
from dalle2_jax.storage import paths

PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    "(generate, interpolate, text_diff, inpaint, outpaint) A text that says what the image is to "
    "show. generate takes several: repeat the flag.",
)
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "(as --prompt) A text file with one prompt a line, after those of --prompt.",
)
N = flags.DEFINE_integer(
    "n", 4, "(generate, variations, inpaint, outpaint) Images for each prompt or image."
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all noise, 0 to 4294967295. One seed gives the same images every time."
)
OUT = flags.DEFINE_string(
    "out", "out", "Folder to write the images to, or gs://BUCKET/FOLDER. It is created."
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    "tiny",
    "The model: 'tiny' (in the package), a model folder, a folder that diffusers saved (Karlo), or "
    "a hub id.",
)
SIZE = flags.DEFINE_integer(
    "size",
    None,
    "Side of the generated images in pixels, as 128, 512 or 1024. Default: the model's.",
)
PRIOR = flags.DEFINE_enum(
    "prior",
    None,
    ["diffusion", "ar", "none"],
    "(generate, interpolate, inpaint, outpaint) The prior that samples z_img for a prompt; none "
    "decodes z_txt in its place. Default: the model's.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Images generated at a time. More need more memory."
)
LIKE = flags.DEFINE_string(
    "like",
    None,
    "A PNG that this command wrote: repeat that image. Other flags override what the file says. "
    "Those that change the number of images, such as --n or --prompt, repeat the whole run.",
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
