"""A user's own folder of pictures and captions."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import folder_source, pipeline
from dalle2_jax.data.examples import Damage
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


def test_captions_beside_the_pictures(captioned):
    found = folder_source.open_folder(captioned)
    assert [p.name for p in found.pictures] == ["a.png", "b.png", "c.png"]
    assert found.captions[2] == ["a blue square", "blue"]


def test_metadata_jsonl(folder):
    lines = [
        '{"file_name": "b.png", "text": "green"}',
        "",
        '{"file_name": "a.png", "text": ["x", "y"]}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = folder_source.open_folder(folder)
    assert [p.name for p in found.pictures] == ["a.png", "b.png"]
    assert found.captions == [["x", "y"], ["green"]]


def test_captions_csv(folder):
    (folder / "captions.csv").write_text('file_name,text\na.png,"one, two"\na.png,three\n')
    assert folder_source.open_folder(folder).captions == [["one, two", "three"]]


def test_only_line_feeds_end_a_line(folder):
    """JSON allows a bare U+2028 inside of text, and form feeds stand in captions of PDFs."""
    text = "one\u2028two\x0cthree"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\r\n", "utf-8")
    assert folder_source.open_folder(folder).captions == [[text]]
    (folder / "metadata.jsonl").unlink()
    for name in COLORS:
        (folder / f"{name}.txt").write_text(f"{text}\r\nfour\n", "utf-8")
    assert folder_source.open_folder(folder).captions[0] == [text, "four"]


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
    assert folder_source.open_folder(folder).captions == [["red"]]


def test_a_folder_named_like_a_picture_is_none(captioned):
    (captioned / "x.png").mkdir()
    assert len(folder_source.open_folder(captioned)) == 3


def test_split_folder(captioned):
    (captioned / "test").mkdir()
    (captioned / "a.png").rename(captioned / "test" / "a.png")
    (captioned / "a.txt").rename(captioned / "test" / "a.txt")
    assert len(folder_source.open_folder(captioned, "test")) == 1
    with pytest.raises(UserError, match="no folder 'validation'"):
        folder_source.open_folder(captioned, "validation")


@pytest.mark.parametrize("table", [False, True])
def test_what_is_held_out_is_not_trained_on(captioned, table):
    (captioned / "test").mkdir()
    (captioned / "a.png").rename(captioned / "test" / "a.png")
    (captioned / "a.txt").rename(captioned / "test" / "a.txt")
    if table:
        rows = "".join(f"{name},x\n" for name in ("b.png", "c.png", "test/a.png"))
        (captioned / "captions.csv").write_text("file_name,text\n" + rows)
    train = folder_source.open_folder(captioned, "train", "test")
    assert [picture.name for picture in train.pictures] == ["b.png", "c.png"]
    held_out = folder_source.open_folder(captioned, "test", "test")
    assert [picture.name for picture in held_out.pictures] == ["a.png"]
    (captioned / "train").mkdir()
    (captioned / "b.png").rename(captioned / "train" / "b.png")
    (captioned / "b.txt").rename(captioned / "train" / "b.txt")
    assert len(folder_source.open_folder(captioned, "train", "test").pictures) == 1


@pytest.mark.parametrize(
    ("table", "text", "match"),
    [
        ("metadata.jsonl", "{nonsense", r"metadata.jsonl, line 1: not JSON"),
        ("metadata.jsonl", "[1]", "line 1: not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1: needs a file_name and a text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "line 1: needs a file_name and a"),
        ("metadata.jsonl", '{"file_name": "d.png", "text": "x"}', "there is no file .*d.png"),
        ("metadata.jsonl", '{"file_name": "../d.png", "text": "x"}', "lies outside"),
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
        folder_source.open_folder(folder)
    assert "\n" not in str(error.value)


UNREADABLE = pathlib.Path("/proc/self/mem")  # a file to the eye, whose reading fails for all users


@pytest.mark.skipif(not UNREADABLE.is_file(), reason="needs /proc")
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "captions.csv"])
def test_an_unreadable_file_is_named(folder, name):
    (folder / name).symlink_to(UNREADABLE)
    with pytest.raises(UserError, match=rf"/{name}: cannot be read \(Input/output error\)$"):
        folder_source.open_folder(folder)


def test_missing_things_are_named(captioned, tmp_path):
    (captioned / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"b\.png: no caption \(1 of 3 .* b\.txt beside it"):
        folder_source.open_folder(captioned)
    with pytest.raises(UserError, match="no such folder"):
        folder_source.open_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in it"):
        folder_source.open_folder(tmp_path / "empty")


def dataset(path, **changes):
    config = dict(source="folder", path=str(path), image_size=4, context_length=8, vocab_size=600)
    return pipeline.make_dataset(config | changes, batch_size=3)


def test_batches_pair_pictures_with_their_captions(captioned):
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
    assert seen == set(captions)  # every caption of every picture is drawn


def test_a_damaged_picture_gives_way_to_the_next_and_is_reported(captioned):
    whole = (captioned / "b.png").read_bytes()
    (captioned / "b.png").write_bytes(whole[: len(whole) // 2])
    batches = dataset(captioned, shuffle=False)
    for _ in range(2):
        batch = next(batches(0))
        np.testing.assert_array_equal(batch["image"][1], batch["image"][2])
        assert batch["image"][1, 0, 0].tolist() == [0, 0, 255]
        # the caption comes with the picture, or the two would be learned as a pair
        blue = pipeline.Tokenizer(8, 600)(["a blue square", "blue"])
        assert batch["tokens"][1].tolist() in blue.tolist()
    assert list(batches.damaged) == [str(captioned / "b.png")]
    assert "not a readable picture" in batches.damaged[str(captioned / "b.png")]


def test_damaged_pictures_are_counted_and_the_first_ten_named(caplog):
    damage = Damage()
    for i in range(45):
        for _ in range(2):  # met again in the next epoch
            damage.add(f"{i}.png", ValueError("cut short"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[9] == "damaged picture 10: 9.png: cut short; the next one takes its place"
    assert lines[10:] == [
        "damaged pictures: the 10 named and 10 more",
        "damaged pictures: the 10 named and 30 more",
    ]
    assert len(damage.found) == 45


def test_nothing_but_damaged_pictures(captioned):
    for name in COLORS:
        (captioned / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="3 pictures in a row are damaged"):
        next(dataset(captioned)(0))


def test_a_picture_that_goes_away(captioned):
    batches = dataset(captioned)
    (captioned / "c.png").unlink()
    with pytest.raises(UserError, match=r"c\.png: cannot be read"):
        next(batches(0))


def test_the_share_of_captions_that_are_cut_is_told_once(captioned, caplog):
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
