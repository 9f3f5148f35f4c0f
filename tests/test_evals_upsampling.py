"""dalle2 evals upsampling: PSNR, a judge's scores and costs, beside bicubic."""

from pathlib import Path
from types import SimpleNamespace

import command
import numpy as np
import pytest
import small_judge
from PIL import Image

from dalle2_jax.evals import cost, psnr
from dalle2_jax.pipelines.dalle2 import DALLE2

FIXTURE = Path(__file__).parent / "fixtures/emoji"


def run(*flags: str):
    return command.run(*command.MAIN, "evals", "upsampling", *flags)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_psnr_of_known_errors():
    true = np.zeros((3, 4, 4, 3), np.float32)
    generated = np.stack([true[0] + 0.2, true[1] + 5.0, true[2]])
    # The range is 2. The errors are 0.2; 1 (5 clipped to 1); and 0, which the limit covers.
    expected = [20 * np.log10(10), 20 * np.log10(2), 120]
    np.testing.assert_allclose(psnr.psnr(generated, true), expected, atol=1e-4)


def test_enlarge_is_pillows_bicubic():
    image = np.random.default_rng(0).integers(70, 180, (1, 8, 8, 3)).astype(np.uint8)
    theirs = Image.fromarray(image[0]).resize((32, 32), Image.Resampling.BICUBIC)
    ours = psnr.enlarge(image, 32)[0]
    # Pillow rounds to whole levels between its two passes, too.
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


class Bicubic:
    """A stand-in for a model whose only upsampler is bicubic interpolation itself."""

    class Stage:
        image_size = 16

        def __call__(self, params, small, keys):
            from dalle2_jax.imaging import arrays

            assert len(keys) == len(small)
            yield from ()  # a sampler yields its progress and returns images
            return arrays.resize(small, 16, "bicubic")

    cascade = SimpleNamespace(
        decoder=SimpleNamespace(image_size=8),
        upsamplers={"upsampler_16": Stage()},
        params={"upsampler_16": {}},
    )


def test_a_bicubic_upsampler_gains_nothing_and_blur_costs_psnr():
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 256, (3, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    _, _, *rows = psnr.table(Bicubic(), images, batch_size=2, seed=0).splitlines()
    true, blurred = (cells(row) for row in rows)
    assert true[:3] == ["8", "16", "true"] and blurred[:3] == ["8", "16", "blurred"]
    assert true[3] == true[4] and true[5] == blurred[5] == "+0.0 ± 0.0"
    assert float(blurred[3]) < float(true[3])


def test_the_clock_measures_each_stage(monkeypatch):
    times = iter([1.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))
    clock = cost.Clock()
    for progress in (("prior", 0, 2), ("prior", 1, 2), ("prior", 2, 2), ("decoder", 0, 1)):
        clock(*progress)
    assert clock.seconds == {"prior": 3.0, "decoder": 0.0}


def test_command_line(folder, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    flags = (f"--weights={folder}", f"--data={FIXTURE}", "--subset=", "--size=16")
    done = run(*flags, "--num=3", "--batch_size=2", f"--judge={judge}")
    assert done.returncode == 0, done.stderr
    psnr_table, judged, _, costs = done.stdout.strip().split("\n\n")
    assert [cells(row)[:3] for row in psnr_table.splitlines()[2:]] == [
        ["8", "16", "true"],
        ["8", "16", "blurred"],
    ]
    names = [cells(row)[0] for row in judged.splitlines()[2:]]
    assert [name.removeprefix("held-out pairs: ") for name in names] == [
        "upsampled",
        "the decoder's, bicubic",
        "true images",
        "chance",
    ]
    rows = {cells(row)[0]: cells(row)[1:] for row in costs.splitlines() if "upsampler" in row}
    evaluations, flops, seconds = rows["upsampler_16"]
    assert evaluations == "2" and float(flops) > 0 and float(seconds) >= 0
    assert DALLE2.from_pretrained(folder).cascade.samplers()["upsampler_16"].evaluations == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size=8"], "--size=8 is generated without an upsampler"),
        (["--size=64"], "from 8 to 16 px"),
        (["--num=0"], "--num=0"),
        (["--size=16", "--data=nowhere"], "nowhere"),
        (["--size=16", "--judge=/nowhere"], "configs/clip.py:judge"),
    ],
)
def test_a_mistake_is_one_line(flags, message, folder):
    done = run(f"--weights={folder}", "--judge=", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
