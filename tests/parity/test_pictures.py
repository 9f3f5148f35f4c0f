"""Image files of odd sizes and modes: what CLIP is shown, against transformers' processor."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

from dalle2_jax.imaging import files  # noqa: E402
from dalle2_jax.imaging.crops import clip_square  # noqa: E402

SIZE = 224
DRAWINGS = sorted(Path(__file__).parent.parent.parent.joinpath("docs", "images").glob("*.png"))


def original(h: int, w: int) -> np.ndarray:
    """A smooth image with noise and edges, of no two alike channels."""
    y, x = np.mgrid[:h, :w]
    waves = [127 + 120 * np.sin(x / (7 + i) + y / (11 - i)) for i in range(3)]
    noise = np.random.default_rng(h * w).normal(0, 20, (h, w, 3))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def shown_by_theirs(image: Image.Image) -> np.ndarray:
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    found = processor(images=image, return_tensors="np").pixel_values[0]
    return np.moveaxis(np.asarray(found), 0, -1)


def shown_by_ours(path: Path) -> np.ndarray:
    processor = transformers.CLIPImageProcessor()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    return (clip_square(files.read(path), SIZE) / 255 - mean) / std


def assert_same(path: Path, image: Image.Image) -> None:
    np.testing.assert_allclose(shown_by_ours(path), shown_by_theirs(image), atol=1e-4)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.name)
def test_drawings_of_the_documents(path):
    assert_same(path, Image.open(path))


@pytest.mark.parametrize("size", [(224, 224), (225, 223), (97, 640), (1000, 301), (3, 50)])
@pytest.mark.parametrize(
    "kind",
    ["RGB.png", "L.png", "P.png", "1.png", "RGB.jpg", "L.jpg", "CMYK.jpg", "RGB.webp"],
)
def test_sizes_and_modes(tmp_path, size, kind):
    mode, suffix = kind.split(".")
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(original(*size)).convert(mode).save(path)
    assert_same(path, Image.open(path))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photograph_is_upright(tmp_path, turn):
    """Their processor leaves EXIF to who opened the file: to it an upright image is given."""
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "photo.jpg"
    Image.fromarray(original(301, 250)).save(path, exif=exif)
    lies = Image.open(path)
    upright = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_90],
    }
    for step in upright.get(turn, []):
        lies = lies.transpose(step)
    assert_same(path, lies)


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    """Pillow's own conversion turns all above 255 white."""
    grey = original(250, 301)[..., 0]
    path = tmp_path / "deep.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert Image.open(path).mode.startswith("I")
    assert_same(path, Image.fromarray(grey))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_seen_through_is_white(tmp_path, mode):
    """Pillow's own conversion leaves what was hidden, often black."""
    drawn = original(240, 240)
    hidden = np.zeros((240, 240), bool)
    hidden[50:100, 60:200] = True
    if mode == "P":
        drawing = Image.fromarray(drawn).quantize(255)
        image = Image.fromarray(np.where(hidden, 255, np.array(drawing)).astype(np.uint8), "P")
        image.putpalette([*drawing.getpalette(), *[0] * 768][:768])
        seen = np.array(image.convert("RGB"))
        stored = io.BytesIO()
        image.save(stored, "PNG", transparency=255)
    else:
        alpha = np.where(hidden, 0, 255).astype(np.uint8)
        image = Image.fromarray(np.dstack([drawn, alpha]), "RGBA").convert(mode)
        seen = np.array(
            Image.fromarray(drawn).convert(mode.removesuffix("A") or "L").convert("RGB")
        )
        stored = io.BytesIO()
        image.save(stored, "PNG")
    seen[hidden] = 255
    path = tmp_path / "clear.png"
    path.write_bytes(stored.getvalue())
    assert_same(path, Image.fromarray(seen))
