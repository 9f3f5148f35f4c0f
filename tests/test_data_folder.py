"""A user's own folder of images and captions."""

import json
import logging
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import pipeline
from dalle2_jax.data.examples import Damage
from dalle2_jax.data.sources import image_folder
from dalle2_jax.errors import UserError

COLORS = {"a": "red", "b": "lime", "c": "blue"}


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (10, 8), color).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def captioned(folder):
    for name, color in COLORS.items():
        (folder / f"{name}.txt").write_text(f"a {color} square\n\n{color}\n")
    return folder


def test_captions_beside_the_images(captioned):
    examples = image_folder.open_folder(captioned)
    assert [p.name for p in examples.images] == ["a.png", "b.png", "c.png"]
    assert examples.captions[2] == ["a blue square", "blue"]


def test_metadata_jsonl(folder):
    lines = [
        '{"file_name": "b.png", "text": "green"}',
        "",
        '{"file_name": "a.png", "text": ["x", "y"]}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples = image_folder.open_folder(folder)
    assert [p.name for p in examples.images] == ["a.png", "b.png"]
    assert examples.captions == [["x", "y"], ["green"]]


def test_captions_csv(folder):
    (folder / "captions.csv").write_text('file_name,text\na.png,"one, two"\na.png,three\n')
    assert image_folder.open_folder(folder).captions == [["one, two", "three"]]


def test_only_line_feeds_end_a_line(folder):
    """JSON allows a bare U+2028 inside of text, and form feeds stand in captions of PDFs."""
    text = "one\u2028two\x0cthree"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\r\n", "utf-8")
    assert image_folder.open_folder(folder).captions == [[text]]
    (folder / "metadata.jsonl").unlink()
    for name in COLORS:
        (folder / f"{name}.txt").write_text(f"{text}\r\nfour\n", "utf-8")
    assert image_folder.open_folder(folder).captions[0] == [text, "four"]


BOM = "\ufeff"  # what Windows' editors begin a UTF-8 file with


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "red"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "red"}'),
        ("captions.csv", "file_name,text\na.png,red\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(folder, name, text):
    for other in "bc":
        (folder / f"{other}.png").unlink()
    (folder / name).write_text(BOM + text, "utf-8")
    assert image_folder.open_folder(folder).captions == [["red"]]


def test_a_folder_named_like_an_image_is_none(captioned):
    (captioned / "x.png").mkdir()
    assert len(image_folder.open_folder(captioned)) == 3


def test_links_to_folders_are_followed_and_each_folder_is_read_once(captioned, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for ending in (".png", ".txt"):
        (captioned / f"a{ending}").rename(elsewhere / f"a{ending}")
    (captioned / "linked").symlink_to(elsewhere)
    (captioned / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(captioned)
    examples = image_folder.open_folder(captioned)
    assert sorted(p.name for p in examples.images) == ["a.png", "b.png", "c.png"]


def test_hidden_files_and_folders_are_left_out(captioned):
    (captioned / ".thumbs").mkdir()
    for hidden in (".thumbs/a.png", "._a.png"):
        (captioned / hidden).write_bytes((captioned / "a.png").read_bytes())
    assert len(image_folder.open_folder(captioned)) == 3


def test_a_folder_that_cannot_be_read_is_named(captioned, monkeypatch):
    """By a stand-in: root, as whom tests may run, reads every folder."""
    (captioned / "plane").mkdir()
    scan = os.scandir

    def refused(path):
        if pathlib.Path(path).name == "plane":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"/plane: cannot be read \(Permission denied\)$"):
        image_folder.open_folder(captioned)


@pytest.mark.parametrize("name", ["plane", "d.png"])
def test_a_link_to_nowhere_is_named(captioned, name):
    (captioned / name).symlink_to(captioned / "gone")
    with pytest.raises(UserError, match=rf"/{name}: a link that leads nowhere"):
        image_folder.open_folder(captioned)


def test_a_link_that_can_be_no_image_is_let_be(captioned):
    (captioned / "README.md").symlink_to(captioned / "gone")
    image_folder.open_folder(captioned)


def test_split_folder(captioned):
    (captioned / "test").mkdir()
    (captioned / "a.png").rename(captioned / "test" / "a.png")
    (captioned / "a.txt").rename(captioned / "test" / "a.txt")
    assert len(image_folder.open_folder(captioned, "test")) == 1
    with pytest.raises(UserError, match=r"no folder 'validation'.*--config\.data\.split="):
        image_folder.open_folder(captioned, "validation")
    with pytest.raises(UserError, match=r"no folder 'held'.* --config\.data\.eval_split= "):
        image_folder.open_folder(captioned, "held", held_out="held")


def test_what_is_read_is_logged(captioned, caplog):
    """A folder `train` may be one kind of image among others, not a split."""
    for name in ("train", "plane"):
        (captioned / name).mkdir()
    for ending in (".png", ".txt"):
        (captioned / f"a{ending}").rename(captioned / "train" / f"a{ending}")
    with caplog.at_level(logging.INFO, "absl"):
        image_folder.open_folder(captioned)
    assert [r.getMessage() for r in caplog.records] == [f"1 images below {captioned / 'train'}"]


@pytest.mark.parametrize("table", [False, True])
def test_what_is_held_out_is_not_trained_on(captioned, table):
    (captioned / "test").mkdir()
    (captioned / "a.png").rename(captioned / "test" / "a.png")
    (captioned / "a.txt").rename(captioned / "test" / "a.txt")
    if table:
        rows = "".join(f"{name},x\n" for name in ("b.png", "c.png", "test/a.png"))
        (captioned / "captions.csv").write_text("file_name,text\n" + rows)
    train = image_folder.open_folder(captioned, "train", "test")
    assert [image.name for image in train.images] == ["b.png", "c.png"]
    held_out = image_folder.open_folder(captioned, "test", "test")
    assert [image.name for image in held_out.images] == ["a.png"]
    (captioned / "train").mkdir()
    (captioned / "b.png").rename(captioned / "train" / "b.png")
    (captioned / "b.txt").rename(captioned / "train" / "b.txt")
    assert len(image_folder.open_folder(captioned, "train", "test").images) == 1


@pytest.mark.parametrize(
    ("table", "text", "match"),
    [
        ("metadata.jsonl", "{nonsense", r"metadata.jsonl, line 1: not JSON"),
        ("metadata.jsonl", "[1]", "line 1: not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1: needs a file_name and a text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "line 1: needs a file_name and a"),
        ("metadata.jsonl", '{"file_name": "d.png", "text": "x"}', "there is no file .*d.png"),
        ("metadata.jsonl", f'{{"file_name": "{__file__}", "text": "x"}}', "is outside"),
        (
            "metadata.jsonl",
            r'{"file_name": "\u0000\n.png", "text": "x"}',
            "line 1: there is no file '.*/.x00.n.png'",
        ),
        ("metadata.jsonl", r'{"file_name": "\ud800.png", "text": "x"}', "line 1: there is no file"),
        (
            "metadata.jsonl",
            f'{{"file_name": "{"a" * 300}", "text": "x"}}',
            "line 1: there is no file",
        ),
        ("metadata.jsonl", "[" * 100_000, r"line 1: not JSON \(.*recursion"),
        ("metadata.jsonl", f'{{"text": {"1" * 5000}}}', r"line 1: not JSON"),
        ("metadata.jsonl", "\n", "metadata.jsonl: no rows in it"),
        ("captions.csv", "file_name,text\n", "captions.csv: no rows in it"),
        ("captions.csv", "file_name,text\n\0.png,x\n", "line 2: there is no file"),
        ("captions.csv", "name,words\na.png,x\n", "must name the columns file_name and text"),
        (
            "captions.csv",
            'file_name,text\na.png,"red\nb.png,green\n',
            "line 2: not CSV .*close every",
        ),
        ("captions.csv", 'file_name,text\na.png,"red" square\n', "line 2: not CSV .*close every"),
        ("captions.csv", "file_name,text\na.png,\n", "line 2: needs a file_name and a text"),
        (
            "captions.csv",
            "file_name,text\na.png,red\na.png,red, and square\n",
            r"captions.csv, line 3: more columns than the first line .* text in quotes",
        ),
    ],
)
def test_malformed_tables(folder, table, text, match):
    (folder / table).write_text(text)
    with pytest.raises(UserError, match=match) as error:
        image_folder.open_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bom", ["", BOM], ids=["", "bom"])
@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.txt", "a square\na café", 2),
        ("metadata.jsonl", '\n{"file_name": "a.png",\r\n"text": "café"}', 3),
        ("captions.csv", "file_name,text\ra.png,café\n", 2),
    ],
)
def test_captions_that_are_not_utf_8_are_refused(captioned, name, text, line, bom):
    """As garbage they would be trained on."""
    (captioned / name).write_bytes(bom.encode() + text.encode("latin-1"))
    match = rf"/{name}, line {line}: not UTF-8 \(byte 0xe9\): save it as UTF-8"
    with pytest.raises(UserError, match=match):
        image_folder.open_folder(captioned)


UNREADABLE = pathlib.Path("/proc/self/mem")  # a file to the eye, whose reading fails for all users


@pytest.mark.skipif(not UNREADABLE.is_file(), reason="needs /proc")
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "captions.csv"])
def test_an_unreadable_file_is_named(folder, name):
    (folder / name).symlink_to(UNREADABLE)
    with pytest.raises(UserError, match=rf"/{name}: cannot be read \(Input/output error\)$"):
        image_folder.open_folder(folder)


def test_missing_things_are_named(captioned, tmp_path):
    (captioned / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"b\.png: no caption \(1 of 3 .* b\.txt beside it"):
        image_folder.open_folder(captioned)
    with pytest.raises(UserError, match="no such folder"):
        image_folder.open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        image_folder.open_folder(tmp_path / ("a" * 300))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        image_folder.open_folder(tmp_path / "empty")


def dataset(path, **changes):
    config = dict(source="folder", path=str(path), image_size=4, context_length=8, vocab_size=600)
    return pipeline.make_dataset(config | changes, batch_size=3)


def test_batches_pair_images_with_their_captions(captioned):
    batches = dataset(captioned)
    tokenizer = pipeline.Tokenizer(8, 600)
    captions = {
        tuple(tokenizer([t])[0]): color
        for color in ("red", "lime", "blue")
        for t in (color, f"a {color} square")
    }
    rgb = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    seen = set()
    for batch, _ in zip(batches(0), range(8), strict=False):
        assert sorted(map(tuple, batch["image"][:, 0, 0].tolist())) == sorted(rgb.values())
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
            color = captions[tuple(tokens)]
            seen.add(tuple(tokens))
            np.testing.assert_array_equal(image, np.broadcast_to(rgb[color], (4, 4, 3)))
    assert seen == set(captions)  # every caption of every image is picked


def test_a_damaged_image_gives_way_to_the_next_and_is_reported(captioned):
    whole = (captioned / "b.png").read_bytes()
    (captioned / "b.png").write_bytes(whole[: len(whole) // 2])
    batches = dataset(captioned, shuffle=False)
    for _ in range(2):
        batch = next(batches(0))
        np.testing.assert_array_equal(batch["image"][1], batch["image"][2])
        assert batch["image"][1, 0, 0].tolist() == [0, 0, 255]
        # the caption comes with the image, or the two would be learned as a pair
        blue = pipeline.Tokenizer(8, 600)(["a blue square", "blue"])
        assert batch["tokens"][1].tolist() in blue.tolist()
    assert list(batches.damaged) == [str(captioned / "b.png")]
    assert "not a readable image" in batches.damaged[str(captioned / "b.png")]


def test_damaged_images_are_counted_and_the_first_ten_named(caplog):
    damage = Damage()
    for i in range(45):
        for _ in range(2):  # met again in the next epoch
            damage.add(f"{i}.png", ValueError("cut short"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[9] == "damaged image 10: 9.png: cut short; the next one takes its place"
    assert lines[10:] == [
        "damaged images: the 10 named and 10 more",
        "damaged images: the 10 named and 30 more",
    ]
    assert len(damage.reasons) == 45


def test_nothing_but_damaged_images(captioned):
    for name in COLORS:
        (captioned / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="3 images in a row are damaged"):
        next(dataset(captioned)(0))


def test_a_image_that_goes_away(captioned):
    batches = dataset(captioned)
    (captioned / "c.png").unlink()
    with pytest.raises(UserError, match=r"c\.png: cannot be read"):
        next(batches(0))


def test_the_share_of_captions_that_are_cut_is_logged_once(captioned, caplog):
    """A space and a letter outside of the merges take one token each at this vocabulary."""
    tokenizer = pipeline.Tokenizer(8, 600)
    fits, longer = "x y z x y z", "x y z x y z x"
    assert [tokenizer.length(text) for text in (fits, longer)] == [8, 9]
    (captioned / "a.txt").write_text(f"{fits}\n")
    for name in "bc":
        (captioned / f"{name}.txt").write_text(f"{longer}\nshort\n")
    batches = dataset(captioned)
    next(batches(0))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{captioned}: 2 of 5 captions (40.0%) are longer than context_length=8")
    caplog.clear()
    dataset(captioned, context_length=9)
    assert not caplog.records
