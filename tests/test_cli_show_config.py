"""train.py --show_config: a line for every setting, with the origin of its value."""

from pathlib import Path

import pytest
from command import MAIN, run

from dalle2_jax import build
from dalle2_jax.cli import show_config

ROOT = Path(__file__).parent.parent
FILE = f"{ROOT}/configs/decoder.py:tiny"


@pytest.fixture(scope="module")
def lines() -> dict[str, tuple[str, str]]:
    """key -> (value, origin)."""
    config = build.read_config(FILE)
    with config.unlocked():
        config.batch_size = 7
    settings = {}
    for line in show_config.lines(config, FILE, ["--config.batch_size=7", "--workdir=w"]):
        setting, origin = line.rsplit("  # ", 1)
        key, value = setting.split(" = ", 1)
        settings[key] = (value.strip(), origin)
    return settings


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("batch_size", "7", "command line"),
        ("num_steps", "12000", FILE),
        ("data.flip", "True", FILE),
        ("task.name", "'decoder'", FILE),
        ("seed", "0", "default of build.defaults"),
        ("mesh.fsdp", "1", "default of build.defaults"),
        ("task.sampling.eta", "0.0", "default of Settings"),
        ("task.nothing_known", "0.5", "default of DecoderTask"),
        ("model.extra_tokens", "4", "default of Decoder"),
        ("model.unet.dropout", "0.0", "default of UNet"),
        ("diffusion.learned_variance", "False", "default of Process"),
        ("data.shuffle_seed", "0", "default of DataConfig"),
    ],
)
def test_each_origin(lines, key, value, origin):
    assert lines[f"config.{key}"] == (value, origin)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_setting_of_every_stage_has_an_origin(path):
    config = build.read_config(f"{path}:tiny")
    for line in show_config.lines(config, f"{path}:tiny", []):
        assert "  # default of " in line or line.endswith(f"  # {path}:tiny")


def test_it_prints_and_touches_nothing(tmp_path):
    flags = [f"--workdir={tmp_path}/w", "--config.clip_from=nowhere"]
    done = run(*MAIN, "train", f"--config={FILE}", "--show_config", *flags)
    assert done.returncode == 0, done.stderr
    assert "config.clip_from = 'nowhere'" in done.stdout
    assert not (tmp_path / "w").exists()
