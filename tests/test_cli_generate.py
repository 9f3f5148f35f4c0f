"""sample.py: files that say how they were generated, and mistakes in one line with status 2."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import command
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import DALLE2, __version__
from dalle2_jax.imaging import files
from dalle2_jax.pipelines.metadata import to_metadata
from dalle2_jax.pipelines.request import InputImage, Request

ROOT = Path(__file__).parent.parent


def sample(cache: Path, *arguments: str, own_cache: bool = False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    if not own_cache:
        return command.run("sample.py", *arguments, env=environment)
    del environment["JAX_COMPILATION_CACHE_DIR"]  # which JAX reads while it is imported
    script = [sys.executable, "sample.py", *arguments]
    return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_images_carry_what_generates_them_again(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("dog, flat\n\n")
    out = tmp_path / "new" / "out"
    done = sample(
        tmp_path / "cache",
        *("--prompt=a cat", f"--prompts_file={tmp_path}/prompts.txt", "--n=2", "--seed=3"),
        *(f"--weights={folder}", f"--out={out}", "--steps=3", "--cfg_scale=decoder=4,prior=1"),
        *("--sampler=dpm++",),
        own_cache=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "grid.png")
    names = [  # with the seed, so that the images of another seed stay beside them
        f"{prompt}-s3-{number}.png" for prompt in ("000-a-cat", "001-dog-flat") for number in (0, 1)
    ]
    assert sorted(p.name for p in out.iterdir()) == [*names, "grid.png"]
    for stage in ("prior", "decoder", "upsampler_16"):
        assert stage in done.stderr  # a progress bar for each

    metadata = files.read_metadata(out / names[3])
    assert (metadata["prompt"], metadata["seed"], metadata["index"]) == ("dog, flat", 3, 1)
    assert metadata["version"] == __version__ and metadata["weights"] == folder
    model = DALLE2.from_pretrained(folder)
    assert metadata["hash"] == model.weights_hash
    settings = {
        name: {stage: s[name] for stage, s in metadata["settings"].items()}
        for name in ("steps", "cfg_scale", "solver")
    }
    assert settings["steps"]["decoder"] == 3 and settings["cfg_scale"]["decoder"] == 4.0
    assert set(settings["solver"].values()) == {"dpm++"}
    again = model.with_settings(**settings).generate(metadata["prompt"], n=2, seed=metadata["seed"])
    again = again[metadata["index"]]
    saved = pixels(out / names[3])
    assert np.abs(saved.astype(int) - again.astype(int)).max() <= 1
    assert files.read_metadata(out / "grid.png")["prompts"] == ["a cat", "dog, flat"]
    assert any((tmp_path / "cache" / "dalle2_jax" / "jax").iterdir())  # the next start is fast

    # --like generates this image alone, under the same name.
    repeated = tmp_path / "repeated"
    done = sample(tmp_path / "cache", f"--like={out / names[3]}", f"--out={repeated}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(repeated / names[3])
    assert [p.name for p in repeated.iterdir()] == [names[3]]
    np.testing.assert_array_equal(pixels(repeated / names[3]), saved)
    assert files.read_metadata(repeated / names[3]) == metadata


def test_the_best_of_many_carry_their_score_and_their_number(folder, tmp_path):
    out = tmp_path / "out"
    done = sample(
        tmp_path / "cache",
        *("--prompt=a cat", "--n=2", "--best_of=5", "--seed=3", "--batch_size=3"),
        *(f"--weights={folder}", f"--out={out}", "--cfg_interval=decoder=0.5:3"),
        *("--cfg_rescale=0.3", "--variance=prior=large", "--sampler=prior=ddpm"),
    )
    assert done.returncode == 0, done.stderr
    first, second = (files.read_metadata(out / f"000-a-cat-s3-{i}.png") for i in (0, 1))
    assert first["score"] >= second["score"] and first["best_of"] == second["best_of"] == 5
    assert first["index"] != second["index"]
    decoder, prior = (first["settings"][stage] for stage in ("decoder", "prior"))
    assert decoder["cfg_interval"] == [0.5, 3.0] and decoder["cfg_rescale"] == 0.3
    assert prior["variance"] == "large" and decoder["variance"] == "small"
    names = ("cfg_interval", "cfg_rescale", "variance", "solver")
    settings = {n: {stage: s[n] for stage, s in first["settings"].items()} for n in names}
    model = DALLE2.from_pretrained(folder).with_settings(**settings)
    best = model.generate("a cat", n=5, seed=3)[first["index"]]
    saved = pixels(out / "000-a-cat-s3-0.png").astype(int)
    assert np.abs(saved - best.astype(int)).max() <= 2


def test_images_of_another_size(folder, tmp_path):
    options = (f"--weights={folder}", f"--out={tmp_path}/out", "--size=12", "--n=1")
    done = sample(tmp_path / "cache", "--prompt=a cat", *options)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / "000-a-cat-s0-0.png"
    saved, metadata = pixels(file), files.read_metadata(file)
    assert metadata["size"] == 12 and saved.shape == (12, 12, 3)
    again = DALLE2.from_pretrained(folder, size=metadata["size"]).generate("a cat", seed=0)[0]
    assert np.abs(saved.astype(int) - again.astype(int)).max() <= 1

    done = sample(
        *(tmp_path / "cache", "--mode=variations", f"--image={file}", "--steps=4", *options)
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "out" / "variations-s0-000-01-variation-0.png"
    assert Image.open(file).size == (12, 12) and files.read_metadata(file)["size"] == 12

    done = sample(tmp_path / "cache", "--prompt=a cat", *options, "--size=17")
    assert done.returncode == 2
    assert done.stderr.endswith("size=17: this model generates images from 8 to 16 px\n")


def test_ctrl_c_is_one_line(folder, tmp_path):
    command = [sys.executable, "sample.py", "--prompt=a", "--n=9999", f"--out={tmp_path}/out"]
    with subprocess.Popen(
        [*command, f"--weights={folder}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        while "prior" not in process.stderr.readline():  # its bar shows while XLA compiles
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        messages = process.stderr.read()
    assert process.returncode == 130
    assert messages.endswith("\nsample.py: stopped\n") and "Traceback" not in messages
    assert not (tmp_path / "out" / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'give --prompt "..." or --prompts_file FILE'),
        (["--prompt=  "], "a prompt is empty"),
        (["--prompts_file=nowhere.txt"], "--prompts_file=nowhere.txt"),
        (["--prompt=a", "--weights=nowhere"], "nowhere"),
        (
            ["--prompt=a", "--steps=many"],
            "--steps=many: write 50 or 10:10:3:2:2, or one for",
        ),
        (["--prompt=a", "--steps=decoder=3,decoder=5"], "a stage is named twice"),
        (["--prompt=a", "--steps=0"], "steps must be whole numbers from 1, not 0"),
        (["--prompt=a", "--steps=decodr=3"], "did you mean 'decoder'?"),
        (["--prompt=a", "--sampler=ddin"], "unknown sampler 'ddin'; did you mean 'ddim'?"),
        (["--prompt=a", "--cfg_interval=3"], "--cfg_interval=3: write LOW:HIGH, or one for"),
        (["--prompt=a", "--steps=2:0"], "steps must be whole numbers from 1, not (2, 0)"),
        (["--prompt=a", "--cfg_interval=5:3"], "cfg_interval must be null or [low, high]"),
        (["--prompt=a", "--cfg_rescale=prior=2"], "cfg_rescale must be a number from 0 to 1"),
        (["--prompt=a", "--variance=analytic"], 'variance="analytic" needs x_0_error'),
        (["--prompt=a", "--n=3", "--best_of=2"], "best_of=2 must be at least n=3"),
        (["--prompt=a", "--out=sample.py/x"], "cannot write to the folder sample.py/x"),
        (["--prompt=a", "--out="], "the folder to write to has no name"),
        (["--prompt=a", "--n=0"], "n must be a whole number from 1 to 4294967296, not 0"),
        (["--prompt=a", "--n=x"], "n"),
        (["--prompt=a", "--sede=3"], "sede"),
        (["--prompt=a", "--prior=dalle"], "value should be one of <diffusion|ar|none>"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, arguments, message):
    flags = [f"--weights={folder}", f"--out={tmp_path}/out", *arguments]
    done = sample(tmp_path / "cache", *flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


@pytest.fixture
def image_flags(tmp_path) -> list[str]:
    """--image flags of an image, and of another one that is three pixels wide."""
    rng = np.random.default_rng(0)
    flags = []
    for name, shape in (("a", (20, 30, 3)), ("b", (10_000, 3, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{name}.png")
        flags.append(f"--image={tmp_path / name}.png")
    return flags


def test_a_mode_writes_its_images_a_grid_and_an_animation(folder, image_flags, tmp_path):
    out = tmp_path / "out"
    done = sample(
        tmp_path / "cache",
        *("--mode=interpolate", *image_flags, "--frames=3", "--steps=2", "--seed=5"),
        *(f"--weights={folder}", f"--out={out}"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "interpolate.png")
    frames = [
        f"interpolate-s5-000-0{i}-{label}.png" for i, label in enumerate(("0-00", "0-50", "1-00"))
    ]
    assert sorted(p.name for p in out.iterdir()) == [*frames, "interpolate.png", "interpolate.webp"]
    metadata = files.read_metadata(out / frames[1])
    assert (metadata["mode"], metadata["label"], metadata["seed"]) == ("interpolate", "0.50", 5)
    names = [Path(flag.partition("=")[2]).name for flag in image_flags]
    assert [entry["name"] for entry in metadata["images"]] == [f"../{name}" for name in names]
    assert metadata["settings"]["decoder"]["steps"] == 2
    with Image.open(out / "interpolate.webp") as animation:
        assert animation.n_frames == 4 and animation.size == (16, 16)  # there and back

    # --like opens the inputs again and writes this frame alone, under the same name.
    repeated = tmp_path / "repeated"
    done = sample(tmp_path / "cache", f"--like={out / frames[1]}", f"--out={repeated}")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in repeated.iterdir()] == [frames[1]]
    np.testing.assert_array_equal(pixels(repeated / frames[1]), pixels(out / frames[1]))


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        (
            "probe",
            ["--mode=variations"],
            "the image is one of mode=probe: leave out --mode=variations",
        ),
        ("probe", ["--n=2"], "--n goes with --mode=generate or variations or inpaint or outpaint"),
        ("probe", ["--prompt=x"], "mode=probe: 1 x prompt; it takes an image"),
        ("probe", ["--image=no.png"], "cannot read no.png"),
        ("generate", ["--best_of=1"], "best_of=1 must be at least n=2, the number of images kept"),
        ("old", [], "was written by another version of dalle2_jax"),
    ],
)
def test_like_refuses_what_does_not_fit_its_file(mode, flags, message, image_flags, tmp_path):
    images = (InputImage.open(image_flags[0].partition("=")[2], "a.png"),)
    fields = {"prompts": ("a",), "n": 2} if mode == "generate" else {"images": images}
    metadata = {"prompt": "a", "seed": 1}
    if mode != "old":
        metadata = to_metadata(Request(mode=mode, **fields)) | {"row": 0, "index": 0}
    files.save_png(tmp_path / "like.png", np.zeros((8, 8, 3), np.uint8), metadata)
    done = sample(tmp_path, f"--like={tmp_path}/like.png", f"--out={tmp_path}/out", *flags)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=varations"], "value should be one of <generate|reconstruct|variations|"),
        (["--mode=variations"], "mode=variations: 0 x image; it takes an image"),
        (["--mode=variations", "A", "--prompt=x"], "mode=variations: 1 x prompt; it takes"),
        (
            ["--mode=interpolate", "A"],
            "mode=interpolate takes two images, or an image and",
        ),
        (
            ["--mode=text_diff", "A"],
            "mode=text_diff: 0 x prompt; it takes an image and a prompt",
        ),
        (["--prompt=x", "A"], "a.png: say with --mode what to do with it"),
        (["--mode=interpolate", "A", "B", "--frames=1"], "--frames=1: 1 is not integer >= 2"),
    ],
)
def test_what_a_mode_does_not_take_is_refused_in_one_line(flags, message, image_flags, tmp_path):
    flags = [{"A": image_flags[0], "B": image_flags[1]}.get(flag, flag) for flag in flags]
    done = sample(tmp_path, *flags)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
