"""What every command shares: one line for a mistake, no noise, a cache where there is a home."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dalle2_jax import commands

SCRIPT = """
import logging
from dalle2_jax import commands
from dalle2_jax.errors import UserError

def main():
    for path in ("jax/_src/xla_bridge.py", "orbax/checkpoint.py", "mine.py"):
        record = logging.LogRecord("jax", logging.WARNING, path, 1, f"said by {path}", (), None)
        logging.getLogger().handle(record)
    raise ERROR

commands.run(main)
"""


@pytest.mark.parametrize(
    ("error", "status", "told"),
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
def test_a_mistake_is_one_line_without_noise(tmp_path, error, status, told):
    (tmp_path / "c.py").write_text(SCRIPT.replace("ERROR", error))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "c.py")],
        env={"PATH": "", "PYTHONPATH": str(Path(commands.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and told in done.stderr
    lines = [line for line in done.stderr.splitlines() if "said by" in line]
    assert len(lines) == 1 and lines[0].endswith("said by mine.py")
    assert status == 1 or len(done.stderr.splitlines()) == 2


@pytest.fixture
def cache_folder(monkeypatch):
    """() -> where the cache was set to lie; the setting itself is left alone."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    return lambda: settings.get("jax_compilation_cache_dir")


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch, cache_folder, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands.keep_compiled_programs()
    assert cache_folder() == str(tmp_path / "dalle2_jax" / "jax")


def test_without_a_home_there_is_no_cache(monkeypatch, cache_folder):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    commands.keep_compiled_programs()
    assert cache_folder() is None
