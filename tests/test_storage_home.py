"""~ is the user's home wherever a path is given, also where no shell has expanded it."""

import os
from pathlib import Path

import numpy as np
import pytest
import toy_task
from command import MAIN, run
from PIL import Image

from dalle2_jax.data.sources import image_folder, tfds_folder
from dalle2_jax.imaging import files
from dalle2_jax.storage import config_file, model_names, paths
from dalle2_jax.train import loop

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests/fixtures/emoji"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    assert not (ROOT / "~").exists() and not Path("~").exists()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("~", "HOME"),
        ("~/a/b", "HOME/a/b"),
        ("a~", "a~"),
        ("a/~/b", "a/~/b"),
        ("./~", "~"),
        ("~nobody-has-this-name/a", "~nobody-has-this-name/a"),
    ],
)
def test_a_tilde_at_the_start_is_home(home, name, path):
    assert str(paths.to_path(name)) == path.replace("HOME", str(home))


def test_images_and_data_are_read_from_home(home):
    (home / "images").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(home / "images/a.png")
    (home / "images/a.txt").write_text("a cat\n")
    assert files.read("~/images/a.png").shape == (8, 8, 3)
    assert image_folder.open_folder("~/images", "train", "") is not None
    (home / "emoji").symlink_to(FIXTURE)
    assert tfds_folder.open_split("~/emoji").path == home / "emoji"


def test_models_and_configs_are_read_from_home(home):
    (home / "m").mkdir()
    assert model_names.resolve("~/m") == home / "m"
    (home / "c.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict(dict(a=1))\n"
    )
    assert config_file.load("~/c.py").a == 1


@pytest.mark.usefixtures("one_device")
def test_a_run_is_written_to_home(home):
    config = toy_task.config(num_steps=1, export_to="~/exported")
    loop.train(config, toy_task.ToyTask(), toy_task.dataset(), "~/w")
    assert (home / "w/metrics.jsonl").is_file() and (home / "w/checkpoints/1").is_dir()
    assert (home / "exported/config.json").is_file()


def test_commands_read_from_home_and_write_to_it(home):
    for name, alpha in (("image", 255), ("mask", 0)):
        pixels = np.full((16, 16, 4), (200, 30, 30, 255), np.uint8)
        pixels[4:8, 4:8, 3] = alpha
        Image.fromarray(pixels).save(home / f"{name}.png")
    (home / "prompts.txt").write_text("a cat\n")
    done = run(
        *(*MAIN, "edit", "--mode=inpaint", "--image=~/image.png", "--mask=~/mask.png"),
        *("--prompts_file=~/prompts.txt", "--preview_mask", "--out=~/out"),
        env={**os.environ, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (home / "out").iterdir()] == [".png"]
