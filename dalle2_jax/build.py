"""Names in a config -> objects. An unknown key is an error that names the near miss.

A config (configs/*.py) lists what differs from `defaults()` and from the defaults of the classes
that its sections are made into; `complete` fills in the rest.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dalle2_jax import stages
from dalle2_jax.data.config import DataConfig
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import config_file
from dalle2_jax.types import Batch, Task
from dalle2_jax.validation.sections import check_keys, check_numbers, construct, with_defaults

Config = Any  # a ConfigDict: its attributes have no types

# Sections whose keys belong to the stage or the data source: checked by what reads them.
FREE_SECTIONS = ("model", "diffusion", "task", "data")


def defaults() -> Config:
    """The trainer's own settings; those of `FREE_SECTIONS` belong to the stage and the data."""
    return ConfigDict(
        dict(
            task={},  # `name`, a family of `stages`, and the task's settings; or the name alone
            model={},
            diffusion={},
            data={},
            optimizer=dict(
                learning_rate=1e-4,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                mu_dtype="float32",  # of the first moments; "bfloat16" is half their memory
                weight_decay=0.0,
                warmup_steps=0,  # updates
                schedule="constant",  # or "cosine", to 0 at the end of the run
                clip_norm=0.0,  # global gradient norm; 0: off
                accumulate=1,  # batches an update
            ),
            batch_size=64,  # of all devices together
            num_steps=1000,  # batches; 0: export the weights of init_from, measured anew
            max_minutes=0.0,  # of wall time; 0: no limit. The same command goes on
            seed=0,
            ema_decay=0.9999,
            ema_warmup=True,  # the n-th update decays by min(ema_decay, (1 + n) / (10 + n))
            log_every=50,
            checkpoint_every=1000,
            keep=2,  # newest checkpoints
            best_metric="",  # e.g. "eval/loss": keep the one with the lowest as well
            preview_every=0,
            preview_size=16,  # examples
            eval_every=0,
            eval_batches=4,
            export_every=0,
            max_grad_norm=1e6,  # a larger gradient is not applied; 0: only one that is not finite
            max_skips=10,  # so many such steps in a row: back to the last good checkpoint
            profile=False,  # a trace of three early steps in WORKDIR, for TensorBoard
            watchdog_seconds=1800.0,  # a step that takes longer ends the process, as other work of
            # more than an hour does; 0: off
            mesh=dict(data=-1, fsdp=1, tensor=1),
            sharding_rules=((".*", "fsdp"),),
            offload="",  # kept in the hosts' memory: "ema", "optimizer" or "ema,optimizer"
            clip_from="",  # model folder of the frozen CLIP
            init_from="",  # model folder to start from
            export_to="",  # model folder to write; "": WORKDIR/model
            export_dtype="float32",
        )
    )


# (least, most) -> the settings that lie between
_RANGES: dict[tuple[float, float], str] = {
    (1, math.inf): "batch_size preview_size eval_batches keep max_skips optimizer.accumulate",
    (
        0,
        math.inf,
    ): "num_steps log_every checkpoint_every preview_every eval_every export_every max_minutes "
    "max_grad_norm watchdog_seconds optimizer.learning_rate optimizer.eps optimizer.weight_decay "
    "optimizer.warmup_steps optimizer.clip_norm",
    (0, 1): "ema_decay optimizer.b1 optimizer.b2",
    (0, 2**32 - 1): "seed",
}


def read_config(path: str) -> Config:
    """Reads FILE:VARIANT and completes it, the section `data` too; raises UserError."""
    config = complete(config_file.load(path))
    with config.unlocked():
        config.data = ConfigDict(with_defaults(DataConfig, config.data))
    return config


def beside_clip(config: Config, path: str) -> Config:
    """`config` of the file `path` (FILE:VARIANT); where it names no folder of a trained CLIP, the
    shapes of the clip.py beside that file serve. They are enough for a compiler."""
    if not config.clip_from:
        file, colon, variant = path.partition(":")
        config.clip_from = f"{Path(file).with_name('clip.py')}{colon}{variant}"
    return config


def complete(config: Config) -> Config:
    """`config` over the defaults, checked and frozen.

    Raises UserError for unknown keys outside the free sections and for values of the wrong type or
    out of range.
    """
    given: Config = ConfigDict(config)
    if isinstance(given.get("task"), str):
        with given.ignore_type():
            given.task = {"name": given.task}
    full = defaults()
    _merge(full, given, "")
    for (least, most), names in _RANGES.items():
        check_numbers("config", least, most, **{n: _at(full, n) for n in names.split()})
    if not full.num_steps and not full.init_from:
        raise UserError("config.num_steps=0 exports the weights of config.init_from: name them")
    if full.task.get("name") in [row.family for row in stages.STAGES]:  # `task` refuses others
        for section, cls in _task_module(full).SECTIONS.items():
            full[section] = ConfigDict(with_defaults(cls, full[section]))
    return ConfigDict(full).lock()


def _at(config: Config, path: str) -> Any:
    return functools.reduce(operator.getitem, path.split("."), config)


def _merge(full: Config, given: Config, prefix: str) -> None:
    check_keys(given, full, f"config{prefix}")
    for key, value in given.items():
        where, old = f"{prefix}.{key}", full[key]
        if isinstance(old, ConfigDict) and not isinstance(value, ConfigDict):
            raise UserError(f"config{where}={value!r} must be a section of settings")
        if not prefix and key in FREE_SECTIONS:
            full[key] = value
        elif isinstance(old, ConfigDict):
            _merge(old, value, where)
        else:
            with full.ignore_type():
                full[key] = _as_type(value, old, f"config{where}")


def _as_type(value: Any, default: Any, where: str) -> Any:
    kind = type(default)
    if value is None and kind is float:
        return 0.0  # "off", as 0 is for every such setting
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        if not all(isinstance(rule, list | tuple) and len(rule) == 2 for rule in value):
            raise UserError(f"{where}={value!r} must be pairs (regex, tactic), like {default!r}")
        return tuple(tuple(rule) for rule in value)
    if type(value) is not kind:
        raise UserError(f"{where}={value!r} must be a {kind.__name__}, like {default!r}")
    return value


def task(config: Config) -> Task:
    """The Task of a complete config. Raises UserError for an unknown one, and for data that it
    cannot be of."""
    construct(DataConfig, config.data, "config.data")
    return _task_module(config).from_config(config)


def _task_module(config: Config) -> Any:
    """Returns the module of the config's task; raises UserError for an unknown one."""
    name = config.task.get("name", "")
    return stages.resolve(stages.find_family(name, "config.task.name").task)


def check(config: Config, task: Task) -> None:
    """Traces the task's first step and preview, computing nothing, before any data is opened.

    Raises UserError where the sizes in the config do not fit together, or its settings of mesh,
    remat, optimizer or offload are none.
    """
    from dalle2_jax.nets.remat import policy_name  # late: flax
    from dalle2_jax.train.optimizer import make_optimizer  # late: optax
    from dalle2_jax.train.state import offloaded

    make_optimizer(config.optimizer, config.num_steps)
    offloaded(config.offload)
    if config.mesh.tensor != 1 and not any("tensor" in str(t) for _, t in config.sharding_rules):
        raise UserError(
            f"config.mesh.tensor={config.mesh.tensor}, but no rule of config.sharding_rules says "
            "tensor: the devices of that axis would all compute the same"
        )
    for name, network in _networks(config):
        policy_name(network.get("remat", "none"), f"config.{name}.remat")
    batch = abstract_batch(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = task.frozen()
    try:
        params = jax.eval_shape(task.init, key)
        jax.eval_shape(functools.partial(task.loss, train=True), params, frozen, batch, key)
        # Whole images, where the loss may have seen crops.
        jax.eval_shape(functools.partial(task.preview, rows=1), params, frozen, batch, key)
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # as flax and jax do
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the sizes in config.model, config.task and config.data do not fit together: {message}"
        ) from error


def abstract_batch(config: Config, place: Any = None) -> Batch:
    """The shapes of a global batch, sharded as `place` says."""
    data = construct(DataConfig, config.data, "config.data")
    b, size = config.batch_size, data.image_size
    batch: Any = {
        "image": jax.ShapeDtypeStruct((b, size, size, 3), np.uint8, sharding=place),
        "tokens": jax.ShapeDtypeStruct((b, data.context_length), np.int32, sharding=place),
    }
    return batch


def not_rematerialised(config: Config) -> list[str]:
    """The networks of `config` whose blocks' results are kept: model, or model.unet, model.text."""
    return [name for name, x in _networks(config) if x.get("remat", "none") not in ("full", True)]


def _networks(config: Config) -> list[tuple[str, Config]]:
    """The sections of `config` that have blocks, by name."""
    sections = [("model", config.model)]
    sections += [(f"model.{k}", v) for k, v in config.model.items() if isinstance(v, ConfigDict)]
    return [(name, x) for name, x in sections if "depth" in x or "num_blocks" in x]


def without_remat(config: Config) -> Config:
    """`config` with nothing computed twice: every `remat` in its model is off."""

    def off(section: Any) -> Any:
        if not isinstance(section, ConfigDict):
            return section
        return {k: "none" if k == "remat" else off(v) for k, v in section.items()}

    plain = config.copy_and_resolve_references()
    with plain.unlocked(), plain.ignore_type():
        plain.model = ConfigDict(off(config.model))
    return plain


def dataset(config: Config, split: str) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    """start step -> numpy batches from that step on: those of their rows that this host's devices
    hold in config.mesh.

    Raises UserError where the mesh fits neither the devices nor config.batch_size.
    """
    from dalle2_jax.data import pipeline  # late: TensorFlow

    rows = sharding.local_rows(sharding.make_mesh(config.mesh), config.batch_size)
    return pipeline.make_dataset(
        config.data,
        split=split,
        batch_size=config.batch_size,
        rows=rows,
    )
