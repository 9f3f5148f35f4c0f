"""Behaviour that all commands share: mistakes in one line, no noise, the compilation cache."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from command import MAIN, run

from dalle2_jax.cli import commands
from dalle2_jax.pipelines.modes import GENERATE, MODES, MODES_OF

ROOT = Path(__file__).parent.parent

SCRIPT = """
import logging
from dalle2_jax.cli import commands
from dalle2_jax.errors import UserError

def main():
    for path in ("jax/_src/xla_bridge.py", "orbax/checkpoint.py", "mine.py"):
        record = logging.LogRecord("jax", logging.WARNING, path, 1, f"logged by {path}", (), None)
        logging.getLogger().handle(record)
    raise ERROR

commands.run(main)
"""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("UserError('one', 'two')", 2, "c.py: ('one', 'two')"),
        ("UserError('a\\nb')", 2, "c.py: a b"),
        (
            "ModuleNotFoundError(name='optax')",
            2,
            "optax is not installed: in the project's",
        ),
        ("ModuleNotFoundError('other', name='other')", 1, "Traceback"),
    ],
)
def test_a_mistake_is_one_line_without_noise(tmp_path, error, status, message):
    (tmp_path / "c.py").write_text(SCRIPT.replace("ERROR", error))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "c.py")],
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and message in done.stderr
    lines = [line for line in done.stderr.splitlines() if "logged by" in line]
    assert len(lines) == 1 and lines[0].endswith("logged by mine.py")
    assert status == 1 or len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "name"),
    [(["sample.py"], "sample.py"), (["train.py"], "train.py"), ([*MAIN, "generate"], "dalle2")],
)
def test_a_python_without_the_libraries_prints_how_to_install_them(script, name):
    command = [sys.executable, "-S", *script]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{name}: the project's libraries are not installed in" in done.stderr


CTRL_C = """
import hashlib, signal, time
from dalle2_jax.cli import commands

class Swallows:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(100)

def swallows():
    Swallows()

def computes():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as while XLA compiles, no handler runs

def cleans_up():
    try:
        print("ready", flush=True)
        time.sleep(100)
    finally:
        print("cleaned up")

SETUP
commands.run(MAIN)
"""


def interrupt(process: subprocess.Popen, number=signal.SIGINT) -> tuple[str, list[str]]:
    """Sends a signal once "ready" is printed; returns the rest of stdout and stderr's lines."""
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return out, err.split("\n")


@pytest.mark.parametrize(
    ("main", "setup", "out"),
    [
        # A process that was started in the background ignores SIGINT.
        ("cleans_up", "signal.signal(signal.SIGINT, signal.default_int_handler)", "cleaned up\n"),
        ("swallows", "signal.signal(signal.SIGINT, commands.stop)", ""),
        ("computes", "commands.stop_at_once()", ""),
    ],
)
def test_ctrl_c_is_one_line(tmp_path, main, setup, out):
    (tmp_path / "c.py").write_text(CTRL_C.replace("SETUP", setup).replace("MAIN", main))
    command = [sys.executable, str(tmp_path / "c.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert interrupt(process) == (out, ["", "c.py: stopped", ""])
    assert process.returncode == 130


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_before_the_training_loop(tmp_path, number, status):
    (tmp_path / "c.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(100)\n")
    command = [sys.executable, "train.py", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert interrupt(process, number)[1][-3:] == ["", "train.py: stopped", ""]
    assert process.returncode == status


@pytest.mark.parametrize(
    ("arguments", "status", "texts"),
    [
        (["sample.py", "-h"], 0, ["python sample.py", "--prompt:", "--mode:", "--steps:"]),
        (["train.py", "--help"], 0, [f.stem for f in sorted((ROOT / "configs").glob("*.py"))]),
        ([*MAIN, "evals", "report", "-h"], 0, ["--judge:", "--num:"]),
        (
            [*MAIN, "evals", "upsampling", "-h"],
            0,
            ["default: 'data/emoji_1024'"],
        ),
        ([*MAIN, "data", "emoji", "--help"], 0, ["--size:"]),
        (
            ["train.py", "--config=configs/prior.py:tiny", "--workdir=w", "--num_processes=2"],
            2,
            ["train.py: --coordinator_address and --process_id missing: give"],
        ),
        (
            ["sample.py", "--weights=tiny", "--topology=v5e:1x1", "--batch_size=0"],
            2,
            ["sample.py: --batch_size=0 must be 1 or more"],
        ),
        (
            ["train.py", "--config=configs/clip.py:tiny", "--workdir=w", "--topology="],
            2,
            ["train.py: --topology= is unknown: write v4, v5e, v5p, v6e and a shape"],
        ),
        (
            ["train.py", "--config=configs/prior.py:tiny", "--workdir=w", "--auto_batch"],
            2,
            ["train.py: --auto_batch goes with --topology: give a slice"],
        ),
        (
            ["sample.py", "--prompt=a cat", "--thorough"],
            2,
            ["sample.py: --thorough goes with --topology: give a slice"],
        ),
        (
            [*MAIN, "evals", "report", "--num=0"],
            2,
            ["dalle2 evals report: --num=0 must be 1"],
        ),
        (
            [*MAIN, "data", "emoji", "x"],
            2,
            ["dalle2 data emoji: unknown argument 'x'"],
        ),
    ],
)
def test_help_and_the_commands_name(arguments, status, texts):
    done = run(*arguments)
    assert done.returncode == status
    output = done.stderr if status else done.stdout
    assert all(text in output for text in texts), output


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_a_command_has_only_flags_that_one_of_its_modes_takes(command):
    modes_of = {name.lower(): modes for name, modes in MODES_OF.items()}
    own = {GENERATE} if command == "generate" else MODES.keys() - {GENERATE}
    names = re.findall(r"^ +--(?:\[no\])?(\w+):", run(*MAIN, command, "--help").stdout, re.M)
    assert {"prompt", "n", "seed"} <= set(names)
    unused = [name for name in names if not own & set(modes_of.get(name, MODES))]
    assert unused == []


@pytest.fixture
def cache_folder(monkeypatch):
    """A function that returns the folder set for the cache; jax's own setting stays unchanged."""
    settings = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    return lambda: settings.get("jax_compilation_cache_dir")


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, cache_folder, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands.keep_compiled_programs()
    assert cache_folder() == str(tmp_path / "dalle2_jax" / "jax")


def test_a_cache_that_the_environment_names_stays(monkeypatch, cache_folder, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    commands.keep_compiled_programs()
    assert cache_folder() is None


def test_without_a_home_there_is_no_cache(monkeypatch, cache_folder):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    commands.keep_compiled_programs()
    assert cache_folder() is None
