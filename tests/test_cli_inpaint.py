"""sample.py --mode inpaint and outpaint, as a user types them."""

import numpy as np
import pytest
from PIL import Image
from test_cli_generate import sample

from dalle2_jax.imaging import files as images


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Files of an image, of masks for it, and of the image with transparent pixels."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (16, 16, 3), np.uint8)
    right = np.arange(16)[None].repeat(16, 0) >= 8
    alpha = np.where(right, 0, 255)[..., None].astype(np.uint8)
    arrays = {
        "a": rgb,
        "white": np.where(right, 255, 0).astype(np.uint8),
        "black": np.zeros((16, 16), np.uint8),
        "clear": np.concatenate([np.zeros_like(rgb), alpha], axis=-1),
        "hole": np.concatenate([rgb, alpha], axis=-1),
        "small": np.full((8, 8), 255, np.uint8),
    }
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in arrays}


@pytest.mark.parametrize("mask_name", ["white", "clear", "hole"])
def test_a_mask_is_white_or_clear_or_the_images_own_alpha(mask_name, files, folder, tmp_path):
    out = tmp_path / "out"
    if mask_name == "hole":
        flags = [f"--image={files['hole']}"]
    else:
        flags = [f"--image={files['a']}", f"--mask={files[mask_name]}"]
    done = sample(
        tmp_path / "cache",
        *("--mode=inpaint", *flags, "--prompt=a cat", "--n=2", "--steps=2", "--feather=0"),
        *(f"--weights={folder}", f"--out={out}"),
    )
    assert done.returncode == 0, done.stderr
    assert "was not trained to inpaint" in done.stderr
    names = ["given", "mask", "edit-0", "edit-1"]
    files_of = [f"inpaint-s0-000-0{i}-{name}.png" for i, name in enumerate(names)]
    assert sorted(p.name for p in out.iterdir()) == [*files_of, "inpaint.png"]
    before, mask, *edited = (np.asarray(Image.open(out / name)) for name in files_of)
    for image in edited:
        np.testing.assert_array_equal(image[:, :8], before[:, :8])
        assert (image[:, 8:] != before[:, 8:]).any()
    tint = mask[:, 8:] - np.floor(0.4 * before[:, 8:])  # in stripes of red and white
    assert (abs(tint[..., 0] - 153) <= 1).all() and set(tint[0, :, 1] > 100) == {True, False}
    np.testing.assert_array_equal(mask[:, :8], before[:, :8])
    metadata = images.read_metadata(out / files_of[2])
    assert metadata["feather"] == 0 and metadata["settings"]["decoder"]["repeats"] == 5


def test_a_preview_generates_nothing(files, tmp_path):
    out = tmp_path / "out"
    flags = ["--mode=outpaint", f"--image={files['a']}", "--left=4", "--down=2", "--preview_mask"]
    done = sample(tmp_path / "cache", *flags, f"--out={out}", "--weights=nowhere/none")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.iterdir()] == ["mask.png"]
    preview = np.asarray(Image.open(out / "mask.png"))
    assert preview.shape == (18, 20, 3)
    np.testing.assert_array_equal(preview[:16, 4:], images.read(files["a"]))


def test_notes_say_what_takes_long_and_what_is_cut(files, folder, tmp_path):
    flags = ["--mode=outpaint", f"--image={files['a']}", "--right=200", f"--prompt={'cat ' * 20}"]
    flags += ["--n=1", "--steps=1", f"--weights={folder}", f"--out={tmp_path / 'out'}"]
    done = sample(tmp_path / "cache", *flags)
    assert done.returncode == 0, done.stderr
    assert "note: this takes about 25 frames of 16 px" in done.stderr
    assert "note: a prompt is too long, only" in done.stderr


def test_an_image_is_extended(files, folder, tmp_path):
    out = tmp_path / "out"
    flags = ["--mode=outpaint", f"--image={files['a']}", "--left=4", "--down=9", "--n=1"]
    done = sample(tmp_path / "cache", *flags, "--steps=2", f"--weights={folder}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "note: a prompt" not in done.stderr and "frames" not in done.stderr
    extended = np.asarray(Image.open(out / "outpaint-s0-000-00-edit-0.png"))
    assert extended.shape == (25, 20, 3)
    np.testing.assert_array_equal(extended[:16, 4:], images.read(files["a"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=inpaint", "a"], "has no transparent pixel (alpha 0): give a mask"),
        (["--mode=inpaint", "a", "--mask=black"], "the mask leaves nothing to regenerate"),
        (["--mode=inpaint", "a", "--mask=small"], "the mask is 8 x 8, the image 16 x 16"),
        (["--mode=inpaint", "a", "--mask=none.png"], "cannot read none.png: No such file"),
        (["--mode=inpaint", "--mask=white"], "mode=inpaint: 0 x image; it takes an image, a mask"),
        (
            ["--mode=outpaint", "a"],
            "outpaint: give left, right, up or down, how many",
        ),
        (["--mode=inpaint", "a", "--left=3"], "--left goes with --mode=outpaint"),
        (["--mode=outpaint", "a", "--left=-3"], "--left=-3"),
        (["--prompt=x", "--mask=white"], "goes with --mode=inpaint, not generate"),
        (
            ["--prompt=x", "--preview_mask"],
            "--preview_mask goes with --mode=inpaint or outpaint, not generate",
        ),
        (["--mode=inpaint", "a", "--mask="], "--mask= names no file"),
        (["--mode=inpaint", "a", "--theta=0.3"], "--theta goes with --mode=text_diff, not inpaint"),
        (["--mode=reconstruct", "a", "--n=3"], "--n goes with --mode=generate or variations or"),
        (["--prompt=x", "--feather=3"], "--feather goes with --mode=inpaint or outpaint"),
        (
            ["--mode=variations", "a", "--best_of=3"],
            "--best_of goes with --mode=generate, not variations",
        ),
        (["--prompt=x", "--best_of=0"], "--best_of=0"),
    ],
)
def test_mistakes_are_one_line(flags, message, files, folder, tmp_path):
    command = []
    for flag in flags:
        name, _, value = flag.partition("=")
        if flag in files:
            command.append(f"--image={files[flag]}")
        elif name == "--mask" and value in files:
            command.append(f"--mask={files[value]}")
        else:
            command.append(flag)
    done = sample(tmp_path / "cache", *command, f"--weights={folder}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "note:" not in line]) == 1
