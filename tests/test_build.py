"""Configs are completed and checked; train.py tells a mistake in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dalle2_jax import build
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
        ({"batch_size": 0}, "config.batch_size=0 must be 1 or more"),
        ({"optimizer": 3}, "config.optimizer=3 must be a section"),
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
        build.check_overrides(["--workdir=x", argument], config)
    build.check_overrides(["--config=f", f"--config.{near}=3", "--noconfig.ema_warmup"], config)


def test_unknown_task_is_refused():
    with pytest.raises(UserError, match="unknown key 'decodr'; did you mean 'decoder'"):
        build.task(build.complete({"task": "decodr"}))


CONFIG = """
from ml_collections import ConfigDict
def get_config(variant):
    return ConfigDict({"task": "decodr", "batch_size": int(variant)})
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config.batchsize=3"], "did you mean 'batch_size'?"),
        ([], "did you mean 'decoder'?"),
    ],
)
def test_train_py_exits_2_with_one_line(tmp_path, arguments, told):
    (tmp_path / "c.py").write_text(CONFIG)
    command = [sys.executable, "train.py", f"--config={tmp_path}/c.py:8", f"--workdir={tmp_path}/w"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()
