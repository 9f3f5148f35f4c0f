"""Flags that all evaluations share: the model, its judge, and the pairs to generate.

Modules that take time to import are imported when they are used, so that mistakes in the flags are
reported, and Ctrl-C works, at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from dalle2_jax.errors import UserError

if TYPE_CHECKING:
    from dalle2_jax.evals.groups import Group
    from dalle2_jax.evals.judge import Judge
    from dalle2_jax.pipelines.dalle2 import DALLE2

WEIGHTS = flags.DEFINE_string(
    "weights", "tiny", "The model to evaluate: 'tiny', a model folder, or a hub id."
)
JUDGE = flags.DEFINE_string(
    "judge",
    "runs/judge/model",
    "Model folder of the judge, a CLIP that takes no part in generating; `make evals` trains it "
    "(configs/clip.py:judge).",
)
DATA = flags.DEFINE_string(
    "data", "data/emoji", "Folder of the emoji data set, as `make data` writes it."
)
SUBSET = flags.DEFINE_string(
    "subset",
    "concrete,group=animals-nature|food-drink|objects|smileys-emotion",
    "Records to use; name those that the model was trained on. Empty: all records.",
)
SIZE = flags.DEFINE_integer("size", None, "Side of the images in pixels. Default: the model's.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the choice of pairs and of all noise.", 0, 2**32 - 1
)


def load_model() -> DALLE2:
    """Loads the model of --weights at --size; errors as of `DALLE2.from_pretrained`."""
    from dalle2_jax.pipelines.dalle2 import DALLE2

    return DALLE2.from_pretrained(WEIGHTS.value, size=SIZE.value)


def load_judge(model: DALLE2, batch_size: int = 64) -> Judge:
    """Loads the judge of --judge.

    Raises UserError if it is missing or damaged, or is the CLIP that `model` generates with.
    """
    from dalle2_jax.evals.judge import Judge

    judge = Judge.load(JUDGE.value, batch_size)
    if judge.is_clip(model.cascade.params["clip"]):
        raise UserError(
            f"--judge={JUDGE.value} is the CLIP that generates: it would judge itself; "
            "train another with configs/clip.py:judge"
        )
    return judge


def read_groups(num: int, *names: str) -> tuple[list[Group], list[str]]:
    """Reads `num` pairs of each named group, or of all groups: see `groups.read_groups`."""
    from dalle2_jax.evals.groups import SPLITS, read_groups

    return read_groups(DATA.value, SUBSET.value, num, SEED.value, names or tuple(SPLITS))


def read_held_out_pairs(num: int) -> tuple[Group, list[str]]:
    """Reads `num` held-out pairs, which most evaluations use, and all concepts of the subset."""
    from dalle2_jax.evals.groups import HELD_OUT

    (group,), concepts = read_groups(num, HELD_OUT)
    return group, concepts
