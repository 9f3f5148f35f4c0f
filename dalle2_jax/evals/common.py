"""What every command of this room is asked by its flags: a model, its judge, and pairs to draw.

What takes time to import is imported when it is asked for: a mistake in the flags and Ctrl-C are
told at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from dalle2_jax.errors import UserError

if TYPE_CHECKING:
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.evals.judge import Judge
    from dalle2_jax.pipelines.dalle2 import DALLE2

WEIGHTS = flags.DEFINE_string("weights", "tiny", "'tiny', a model folder, or a hub id.")
JUDGE = flags.DEFINE_string(
    "judge", "runs/judge/model", "Model folder of a CLIP that only judges (configs/clip.py:judge)."
)
DATA = flags.DEFINE_string("data", "data/emoji", "The emoji set, as `make data` writes it.")
SUBSET = flags.DEFINE_string(
    "subset",
    "concrete,group=animals-nature|food-drink|objects|smileys-emotion",
    "The records asked for; give what the model was trained on. Empty: all.",
)
SIZE = flags.DEFINE_integer("size", None, "Side of the pictures; as the folder says, unless told.")
SEED = flags.DEFINE_integer("seed", 0, "Of the pairs and of all noise.", 0, 2**32 - 1)


def model() -> DALLE2:
    """Of --weights and --size. UserError as of `DALLE2.from_pretrained`."""
    from dalle2_jax.pipelines.dalle2 import DALLE2

    return DALLE2.from_pretrained(WEIGHTS.value, size=SIZE.value)


def judge_of(model: DALLE2, batch_size: int = 64) -> Judge:
    """Of --judge. UserError: it is missing or damaged, or the CLIP that draws."""
    from dalle2_jax.evals.judge import Judge

    judge = Judge.load(JUDGE.value, batch_size)
    if judge.is_clip(model.params["clip"]):
        raise UserError(f"--judge={JUDGE.value} is the CLIP that draws: it would judge itself")
    return judge


def groups(num: int, *names: str) -> tuple[list[Group], list[str]]:
    """Those of these names, or all: see `groups.read_groups`."""
    from dalle2_jax.evals.groups import SPLITS, read_groups

    return read_groups(DATA.value, SUBSET.value, num, SEED.value, names or tuple(SPLITS))


def held_out_pairs(num: int) -> tuple[Group, list[str]]:
    """Of `groups` the one that most commands ask for, and every concept of the subset."""
    from dalle2_jax.evals.groups import HELD_OUT

    (group,), pool = groups(num, HELD_OUT)
    return group, pool
