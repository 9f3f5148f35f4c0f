"""Configs are completed and checked; train.py tells a mistake in one line."""

import math
import sys
from pathlib import Path

import pytest
import small_cascade
from absl import flags
from command import run
from ml_collections import ConfigDict, config_flags

from dalle2_jax import build
from dalle2_jax.cli import config_flag
from dalle2_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def test_defaults_are_filled_in():
    config = build.complete(
        {"task": "clip", "optimizer": {"learning_rate": 1}, "mesh": {"fsdp": 2}}
    )
    assert config.optimizer.learning_rate == 1.0 and config.optimizer.b1 == 0.9
    assert config.mesh.to_dict() == {"data": -1, "fsdp": 2, "tensor": 1}
    assert config.task.name == "clip"
    assert build.complete(config) == config
    with pytest.raises(AttributeError):
        config.batchsize = 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batchsize": 3}, "config: unknown key 'batchsize'; did you mean 'batch_size'?"),
        ({"optimizer": {"learnin_rate": 1.0}}, "did you mean 'learning_rate'?"),
        ({"mesh": {"dat": 1}}, "config.mesh: unknown key 'dat'; did you mean 'data'?"),
        ({"batch_size": "many"}, "config.batch_size='many' must be a int"),
        ({"batch_size": 0}, "config.batch_size must be a number from 1, not 0"),
        ({"preview_size": 0}, "config.preview_size must be a number from 1, not 0"),
        ({"ema_decay": 1.5}, "config.ema_decay must be a number from 0 to 1, not 1.5"),
        ({"ema_decay": math.nan}, "config.ema_decay must be a number from 0 to 1, not nan"),
        ({"eval_every": -1}, "config.eval_every must be a number from 0, not -1"),
        ({"seed": -1}, "config.seed must be a number from 0 to 4294967295, not -1"),
        (
            {"optimizer": {"learning_rate": -1}},
            "config.optimizer.learning_rate must be a number from 0, not -1.0",
        ),
        ({"optimizer": 3}, "config.optimizer=3 must be a section"),
        ({"sharding_rules": ("x",)}, "config.sharding_rules=('x',) must be pairs (regex, tactic)"),
        ({"model": "large"}, "config.model='large' must be a section"),
    ],
)
def test_mistakes_are_named(given, told):
    with pytest.raises(UserError) as error:
        build.complete(given)
    assert told in str(error.value)


def test_none_switches_a_number_off_and_lists_become_tuples():
    config = build.complete(
        {"optimizer": {"clip_norm": None}, "sharding_rules": [["a", "fsdp"]], "max_minutes": 5}
    )
    assert config.optimizer.clip_norm == 0.0
    assert config.sharding_rules == (("a", "fsdp"),)
    assert config.max_minutes == 5.0 and isinstance(config.max_minutes, float)


def test_free_sections_are_kept_as_they_are():
    model = {"width": 64, "mults": (1, 2)}
    assert build.complete(ConfigDict({"model": model})).model.to_dict() == model


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--config.batchsize=3", "batch_size"),
        ("--config.learning_rate=3", "optimizer.learning_rate"),
        ("--config.model.widht=3", "model.width"),
        ("--noconfig.ema_warmupp", "ema_warmup"),
        ("--config.optimizr.b1=3", "optimizer.b1"),
    ],
)
def test_overrides_name_the_near_miss(argument, near):
    config = build.complete({"model": {"width": 64}})
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        config_flag.check_overrides(["--workdir=x", argument], config)
    config_flag.check_overrides(
        ["--config=f", f"--config.{near}=3", "--noconfig.ema_warmup"], config
    )


def test_a_stage_brings_the_defaults_of_its_classes():
    config = build.complete(
        {
            "task": {
                "name": "upsampler",
                "low_size": 8,
                "image_size": 16,
                "sampling": {"steps": 3},
            },
            "model": {"unet": {"channels": 8, "groups": 4}},
        }
    )
    assert config.task.crop_fraction == 0.25 and config.task.sampling.solver == "ddim"
    assert config.task.sampling.steps == 3 and "stage" not in config.task
    unet = config.model.unet
    assert (unet.dropout, unet.groups, config.model.dtype) == (0.0, 4, "float32")
    assert "dtype" not in unet  # the network's own serves
    assert config.diffusion.weighting == "none"
    assert build.complete(config) == config


def test_unknown_task_is_refused():
    with pytest.raises(UserError, match="unknown task 'decodr'; did you mean 'decoder'"):
        build.task(build.complete({"task": "decodr"}))


CONFIG = """
from ml_collections import ConfigDict
def get_config(variant):
    return ConfigDict({"task": "decodr", "batch_size": int(variant)})
"""


@pytest.mark.parametrize(
    ("config", "arguments", "told"),
    [
        ("c.py:8", ["--config.batchsize=3"], "did you mean 'batch_size'?"),
        ("c.py:8", [], "did you mean 'decoder'?"),
        ("c.py:many", [], "c.py:many: invalid literal for int() with base 10: 'many'"),
        ("configs/clip.py:tinny", [], "clip has no variant 'tinny': paper, tpu, tiny, judge"),
        ("README.md:tiny", [], "README.md is no Python file: name one such as configs/"),
    ],
)
def test_train_py_exits_2_with_one_line(tmp_path, config, arguments, told):
    (tmp_path / "c.py").write_text(CONFIG)
    path = config if (ROOT / config.partition(":")[0]).exists() else tmp_path / config
    done = run("train.py", f"--config={path}", f"--workdir={tmp_path}/w", *arguments)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


def parse(monkeypatch, *arguments: str):
    """The config that a command line with these arguments makes."""
    argv = ["train.py", f"--config={ROOT}/configs/upsampler_256.py:tiny", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    values["config"].parser = config_flag.ConfigParser("config")
    values(argv)
    return build.complete(holder.value)


def test_settings_that_a_file_does_not_list_can_be_overridden(monkeypatch):
    config = parse(
        monkeypatch,
        *("--config.data.flip=True", "--noconfig.data.shuffle", "--config.data.ram_gb=3.5"),
        *("--config.data.crop_scale=(0.5, 1.0)", "--config.model.unet.dropout=0.2"),
        *("--config.diffusion.weighting=min_snr_5", "--config.model.dtype=bfloat16"),
    )
    data = config.data
    assert (data.flip, data.shuffle, data.ram_gb, data.crop_scale) == (True, False, 3.5, (0.5, 1.0))
    assert (config.model.unet.dropout, config.diffusion.weighting) == (0.2, "min_snr_5")
    assert build.task(config).network.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("argument", "near"),
    [("data.flop=1", "data.flip"), ("model.unet.dropuot=1", "model.unet.dropout")],
)
def test_their_near_misses_are_told(monkeypatch, argument, near):
    with pytest.raises(flags.Error, match=f"did you mean '{near}'"):
        parse(monkeypatch, f"--config.{argument}")


def test_a_tensor_axis_that_no_rule_uses_is_told():
    config = small_cascade.config("clip", mesh=dict(data=1, fsdp=2, tensor=2))
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=2, but no rule of config"):
        build.check(config, build.task(config))
    config.sharding_rules = (("fc1/kernel", "tensor:-1+fsdp:1"), (".*", "fsdp"))
    build.check(config, build.task(config))
