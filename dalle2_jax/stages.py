"""The table of stages: which network, sampler and task each stage of a model folder has.

A stage is known everywhere by the name it has in a model folder's `config.json`. Loading,
exporting, compiling, training and the Makefile read this table, so adding a stage is one row here
and the files that the row names. Columns are dotted names rather than classes: each floor resolves
its own column only, and the input pipelines that run without jax may import the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from typing import Any

from dalle2_jax.errors import UserError, near_miss


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: the stage's name, or the pattern of a family, as in `upsampler_<px>`.
        network: the Flax module.
        sampler: the class that samples from the network; None if nothing is sampled from it.
        task: the module that trains it: `from_config` and `SECTIONS`.
        configs: the files of `configs/` that train it, in the order in which a cascade trains them.
    """

    name: str
    network: str
    sampler: str | None
    task: str
    configs: tuple[str, ...]

    @property
    def family(self) -> str:
        """The name without the part that varies within a family, as `config.task.name` has it."""
        return self.name.partition("_<")[0]

    def matches(self, stage: str) -> bool:
        """Returns whether `stage` is this row's name or belongs to this row's family."""
        return re.fullmatch(self.name.replace("<px>", r"[1-9]\d*"), stage) is not None


# In the order in which a cascade is trained.
STAGES = (
    Stage(
        name="clip",
        network="dalle2_jax.nets.clip.CLIP",
        sampler=None,
        task="dalle2_jax.tasks.clip",
        configs=("clip",),
    ),
    Stage(
        name="prior",
        network="dalle2_jax.nets.prior.DiffusionPrior",
        sampler="dalle2_jax.sampling.prior.PriorSampler",
        task="dalle2_jax.tasks.prior",
        configs=("prior",),
    ),
    Stage(
        name="ar_prior",
        network="dalle2_jax.nets.ar_prior.ARPrior",
        sampler="dalle2_jax.sampling.ar_prior.ARPriorSampler",
        task="dalle2_jax.tasks.ar_prior",
        configs=("ar_prior",),
    ),
    Stage(
        name="decoder",
        network="dalle2_jax.nets.decoder.Decoder",
        sampler="dalle2_jax.sampling.decoder.DecoderSampler",
        task="dalle2_jax.tasks.decoder",
        configs=("decoder",),
    ),
    Stage(
        name="upsampler_<px>",
        network="dalle2_jax.nets.upsampler.Upsampler",
        sampler="dalle2_jax.sampling.upsampler.UpsamplerSampler",
        task="dalle2_jax.tasks.upsampler",
        configs=("upsampler_256", "upsampler_1024"),
    ),
)


def find(stage: str) -> Stage:
    """Returns the row of `stage`, a name as in `config.json`.

    Raises UserError for an unknown one.
    """
    for row in STAGES:
        if row.matches(stage):
            return row
    names = [row.name for row in STAGES]
    raise UserError(f"unknown stage {stage!r}{near_miss(stage, names)}")


def find_family(family: str, where: str) -> Stage:
    """Returns the row of a family, as `config.task.name` names it.

    Raises UserError for an unknown one; `where` says in the message where the name stands.
    """
    for row in STAGES:
        if row.family == family:
            return row
    names = [row.family for row in STAGES]
    raise UserError(f"{where}: unknown task {family!r}{near_miss(family, names)}")


def resolve(dotted_name: str) -> Any:
    """Imports what a column names: a class, or a module."""
    parent, _, name = dotted_name.rpartition(".")
    try:
        return importlib.import_module(dotted_name)
    except ModuleNotFoundError as error:
        if error.name != dotted_name:
            raise
    return getattr(importlib.import_module(parent), name)


def configs() -> Iterator[str]:
    """Yields the names of the config files of all stages, in training order."""
    for row in STAGES:
        yield from row.configs
