"""PNG files with metadata, animations, reading, and labelled grids."""

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import files, grids, text
from dalle2_jax.storage import paths


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


METADATA = {
    "prompt": "a flat emoji of a red apple 🍎",
    "seed": 7,
    "settings": {"cfg_scale": 2.5, "steps": {"prior": 50}},
    "weights": "0123456789abcdef",
    "version": "0.1.0",
}


def test_round_trip(tmp_path, image):
    path = tmp_path / "new" / "folder" / "a.png"
    files.save_png(path, image, METADATA)
    assert files.read_metadata(path) == METADATA
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_the_metadata_are_an_itxt_chunk_that_others_can_read(tmp_path, image):
    files.save_png(tmp_path / "a.png", image, METADATA)
    raw = (tmp_path / "a.png").read_bytes()
    assert b"iTXtdalle2_jax\x00\x00\x00" in raw  # not compressed
    assert "red apple 🍎".encode() in raw


def test_same_input_same_bytes(tmp_path, image):
    files.save_png(tmp_path / "a.png", image, METADATA)
    files.save_png(tmp_path / "b.png", image, dict(reversed(METADATA.items())))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_prompt_with_half_a_character(tmp_path, image):
    metadata = {"prompt": "broken \ud83d, whole 🍎\n\x00"}
    files.save_png(tmp_path / "a.png", image, metadata)
    assert files.read_metadata(tmp_path / "a.png") == metadata


def test_paths_that_cannot_be_written(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.save_png(tmp_path / "file" / "a.png", image)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        files.save_png(tmp_path / "a.png", image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


def test_a_folder_without_a_name_is_not_the_current_one(tmp_path):
    for nameless in ("", " "):
        with pytest.raises(UserError, match="has no name"):
            paths.prepare_folder(nameless)
    assert paths.prepare_folder(tmp_path / "new").is_dir()


def test_an_image_beyond_pillows_limit_is_refused(tmp_path, image, monkeypatch):
    files.save_png(tmp_path / "a.png", image, METADATA)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow raises from twice that many
    with pytest.raises(UserError, match=r"a\.png is larger than Pillow reads"):
        files.read_metadata(tmp_path / "a.png")


def test_files_without_metadata(tmp_path, image):
    with pytest.raises(UserError, match="No such file"):
        files.read_metadata(tmp_path / "away.png")
    files.save_png(tmp_path / "plain.png", image)
    with pytest.raises(UserError, match="does not say how it was generated"):
        files.read_metadata(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match="not a PNG"):
        files.read_metadata(tmp_path / "text.png")
    files.save_png(tmp_path / "cut.png", image, METADATA)
    data = (tmp_path / "cut.png").read_bytes()
    for length in (4, 20, 60, len(data) // 2):
        (tmp_path / "cut.png").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.png"):
            files.read_metadata(tmp_path / "cut.png")


def test_wrong_arrays_are_refused(tmp_path):
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="an image is uint8"):
            files.save_png(tmp_path / "a.png", wrong)


def find(grid, colour):
    """Returns the box (top, bottom, left, right) of a colour, which must fill it."""
    ys, xs = np.nonzero((grid == np.array(colour, np.uint8)).all(-1))
    assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
    return ys.min(), ys.max(), xs.min(), xs.max()


@pytest.mark.parametrize("labels", [(), ("one", "two words " * 40)])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_grid_shows_every_image_in_order(labels, scale):
    colours = [(200, 10 * i, 40) for i in range(5)]
    tiles = [np.full((40, 48, 3), colour, np.uint8) for colour in colours]
    grid = grids.labelled_grid(
        tiles, 3, row_labels=labels, image_labels=["a", "b", "c " * 30, "", "e"], scale=scale
    )
    assert grid.dtype == np.uint8
    boxes = [find(grid, colour) for colour in colours]
    for top, bottom, left, right in boxes:
        assert (bottom - top + 1, right - left + 1) == (40 * scale, 48 * scale)
    assert boxes[0][0] == boxes[1][0] == boxes[2][0] < boxes[3][0] == boxes[4][0]
    assert boxes[0][2] == boxes[3][2] < boxes[1][2] == boxes[4][2] < boxes[2][2]
    if labels:  # ink above the second row, between the rows of images
        assert (grid[boxes[0][1] + 1 : boxes[3][0]].min(axis=-1) < 128).any()


def test_a_grid_of_one_and_mistakes():
    one = np.zeros((1, 8, 8, 3), np.uint8)
    assert grids.labelled_grid(one, 4).shape[1] < 40
    with pytest.raises(ValueError, match="one image"):
        grids.labelled_grid([], 4)
    with pytest.raises(ValueError, match="2 labels for 1 rows"):
        grids.labelled_grid(one, 1, row_labels=["a", "b"])


def test_wrapping_keeps_the_words_and_the_width():
    font = text.load_font(14, [])
    lines = text.wrap("a red apple\non a\x00 table", font, 70)
    assert " ".join(lines) == "a red apple on a table"
    assert all(font.getlength(line) <= 70 for line in lines)
    broken = text.wrap("x" * 30, font, 100)
    assert "".join(broken) == "x" * 30
    cut = text.wrap("word " * 100, font, 100)
    assert len(cut) == 3
    assert cut[-1].endswith("…")
    assert all(font.getlength(line) <= 100 for line in cut)
    assert text.wrap("é 🍎", text.load_font(14, ["é"]), 100)


def test_slug():
    assert files.slug("A flat emoji: Café / ../x") == "a-flat-emoji-cafe-x"
    assert files.slug("😀") == "image"
    assert len(files.slug("a" * 500)) == 48


def test_a_file_of_any_mode_is_read_as_training_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "alpha.png")
    alpha = rgba[..., 3:] / 255
    over_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(files.read(tmp_path / "alpha.png") - over_white).max() <= 1
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut\.png: not a readable image"):
        files.read(tmp_path / "cut.png")
    with pytest.raises(UserError, match=r"cannot read .*none\.png: No such file"):
        files.read(tmp_path / "none.png")


def test_an_animation_plays_forwards_and_backwards_and_rests_at_its_ends(tmp_path):
    frames = [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 80, 80, 240)]  # two are equal
    files.save_animation(tmp_path / "new" / "a.webp", frames, 100)
    shown, durations = [], []
    with Image.open(tmp_path / "new" / "a.webp") as moving:
        for i in range(moving.n_frames):
            moving.seek(i)
            shown.append(int(np.asarray(moving.convert("L")).mean()))
            durations.append(moving.info["duration"])
    assert (
        sum(durations) == 400 + 100 + 100 + 400 + 100 + 100
    )  # equal frames may be one, shown longer
    assert np.abs(np.array([shown[0], max(shown)]) - [0, 240]).max() < 6
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.save_animation(tmp_path / "file" / "a.webp", frames, 100)
