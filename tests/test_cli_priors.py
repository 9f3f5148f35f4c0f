"""sample.py --prior and --mode probe, and the table of `dalle2 evals priors`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_cascade
import small_judge
from command import MAIN, run
from PIL import Image

from dalle2_jax import DALLE2
from dalle2_jax.imaging import files

FIXTURE = Path(__file__).parent / "fixtures/emoji"


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> str:
    """A model folder with both priors."""
    folder = tmp_path_factory.mktemp("both") / "model"
    return small_cascade.write(folder, (*small_cascade.CONFIGS, "ar_prior"))


@pytest.mark.parametrize(("prior", "stage"), [("ar", "ar_prior"), ("none", "no_prior")])
def test_the_metadata_name_the_prior(both, tmp_path, prior, stage):
    done = run(
        *("sample.py", "--prompt=a cat", "--n=2", "--seed=3", f"--prior={prior}"),
        *(f"--weights={both}", f"--out={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    metadata = files.read_metadata(tmp_path / "000-a-cat-s3-1.png")
    assert set(metadata["settings"]) == {stage, "decoder", "upsampler_16"}
    again = DALLE2.from_pretrained(both).with_prior(prior).generate("a cat", 2, 3)[1]
    saved = np.asarray(Image.open(tmp_path / "000-a-cat-s3-1.png"))
    assert np.abs(saved.astype(int) - again.astype(int)).max() <= 1


def test_probing_writes_its_images_a_grid_and_an_animation(both, tmp_path):
    image = tmp_path / "given.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(image)
    out = tmp_path / "out"
    done = run(
        *("sample.py", "--mode=probe", f"--image={image}", "--steps=2"),
        *(f"--weights={both}", f"--out={out}"),
    )
    assert done.returncode == 0, done.stderr
    names = [
        "probe-s0-000-00-6-directions.png",
        "probe-s0-000-01-all.png",
        "probe.png",
        "probe.webp",
    ]
    assert sorted(p.name for p in out.iterdir()) == names
    assert files.read_metadata(out / names[0])["label"] == "6 directions"


def test_a_stage_that_the_folder_lacks_is_one_line(both, tmp_path):
    folder = Path(shutil.copytree(both, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["stages"]["ar_prior"]
    (folder / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (8, 8)).save(tmp_path / "given.png")
    for flags, message in (
        (["--mode=probe", f"--image={tmp_path}/given.png", "--steps=2"], "has no ar_prior, which"),
        (["--prompt=a", "--prior=ar"], "/model has only 'diffusion' and 'none'"),
    ):
        done = run("sample.py", *flags, f"--out={tmp_path}/out", f"--weights={folder}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_the_ablation_has_a_line_for_each_group_and_prior(both, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    done = run(
        *(*MAIN, "evals", "priors", f"--weights={both}", f"--judge={judge}"),
        *(f"--data={FIXTURE}", "--subset=", "--num=2", "--batch_size=2"),
    )
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert head.startswith("|  | n | cosine to the true z_img | concept first, %")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    names = ("diffusion prior", "AR prior", "no prior (z_txt)", "the true z_img", "true images")
    groups = ("seen pairs", "held-out pairs", "held-out concepts")
    assert [row[0] for row in cells] == [f"{group}: {name}" for group in groups for name in names]
    for row in cells:
        cosines = {"the true z_img": "1.000", "true images": ""}
        if (name := row[0].partition(": ")[2]) in cosines:
            assert row[2] == cosines[name]
        else:
            assert -1 <= float(row[2]) < 1
        assert float(row[6]) >= 0
    assert all(float(row[6]) < 1e-3 for row in cells if row[0].endswith("true images"))


def test_a_judge_that_is_missing_is_one_line(both, tmp_path):
    done = run(*MAIN, "evals", "priors", f"--weights={both}", f"--judge={tmp_path}/no")
    assert done.returncode == 2 and "judge: " in done.stderr and "Traceback" not in done.stderr
