"""The emoji set: fetching, joining, building, and the packaged fixture of real pictures."""

import hashlib
import io
import json
import os
import pathlib
import stat
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from command import MAIN

from dalle2_jax.data.emoji import icon_sets, npm, tfds_builder, words, write
from dalle2_jax.data.sources import tfds_folder
from dalle2_jax.errors import UserError

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "emoji"
SPLITS = tfds_builder.SPLITS


def tarball(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, value in files.items():
            text = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return data.getvalue()


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Puts an `npm` on the PATH that writes `content` as the tarball, or fails with `message`."""

    def install(content=b"", message=""):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "content").write_bytes(content)
        script = folder / "npm"
        action = (
            f"echo '{message}' >&2; exit 1" if message else f"cat {folder}/content > a-b-1.0.0.tgz"
        )
        script.write_text(f"#!/bin/sh\n{action}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    return install


def package(content):
    return npm.Package("@a/b", "1.0.0", hashlib.sha256(content).hexdigest())


def test_fetch_verifies_and_caches(fake_npm, tmp_path):
    content = tarball({"x.json": {"a": 1}})
    fake_npm(content)
    path = npm.fetch(package(content), tmp_path / "cache")
    assert npm.read_json(path, "x.json") == {"a": 1}
    fake_npm(message="offline")
    assert npm.fetch(package(content), tmp_path / "cache") == path


def test_fetch_replaces_a_damaged_cache(fake_npm, tmp_path):
    content = tarball({"x.json": 1})
    fake_npm(content)
    path = npm.fetch(package(content), tmp_path / "cache")
    path.write_bytes(content[:-5])
    assert npm.read_json(npm.fetch(package(content), tmp_path / "cache"), "x.json") == 1


def test_wrong_checksum_leaves_nothing(fake_npm, tmp_path):
    fake_npm(b"something else")
    with pytest.raises(UserError, match=r"^@a/b@1\.0\.0: sha256 .* expected [^\n]*$"):
        npm.fetch(package(b"x"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_failure_and_absence_are_one_line(fake_npm, tmp_path, monkeypatch):
    fake_npm(message="ENOTFOUND packages.example")
    with pytest.raises(UserError, match=r"^@a/b@1\.0\.0: npm pack failed[^\n]*ENOTFOUND[^\n]*$"):
        npm.fetch(package(b"x"), tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        npm.fetch(package(b"x"), tmp_path / "cache")


def test_disk_errors_are_named(tmp_path):
    assert "disk is full" in npm.disk_error(OSError(28, "No space left"), tmp_path)
    assert "no permission" in npm.disk_error(PermissionError(13, "denied"), tmp_path)


def square(color, side=16):
    return {"body": f'<rect width="{side}" height="{side}" fill="{color}"/>'}


def small_sets():
    """Sets whose icons are squares, and emojibase entries for them, as `_join` takes them."""
    chars = {"1f34e": "red-apple", "1f98a": "fox", "1f43a": "wolf", "1f3b8": "guitar"}
    # the guitar is a held-out concept: TFDS writes no empty split
    colors = {"red-apple": "red", "fox": "orange", "wolf": "orange", "guitar": "brown"}
    sets = {}
    for i, style in enumerate(words.STYLES):
        drawn = {name: square(color, 16 - i) for name, color in colors.items()}
        icons = {"icons": drawn, "width": 16, "height": 16}
        sets[style] = {"icons": icons, "chars": chars, "license": "MIT"}
    groups = {
        "groups": {"7": "objects", "4": "food-drink", "3": "animals-nature", "9": "flags"},
        "subgroups": {"42": "food-fruit", "34": "animal-mammal"},
    }
    fruit, animal = {"group": 4, "subgroup": 42}, {"group": 3, "subgroup": 34}
    entries = [
        {"label": "red apple", "hexcode": "1F34E", "order": 1, "tags": ["fruit", ":)"], **fruit},
        {"label": "fox", "hexcode": "1F98A", "order": 2, **animal},
        {"label": "wolf", "hexcode": "1F43A", "order": 3, **animal},
        {"label": "orca", "hexcode": "1FACD", "order": 4, **animal},
        {"label": "flag: X", "hexcode": "1F34E", "order": 5, "group": 9},
        {"label": "guitar", "hexcode": "1F3B8", "order": 6, "group": 7},
        {"label": "regional indicator A", "hexcode": "1F1E7"},
    ]
    return entries, groups, sets


def test_join_drops_flags_unknown_icons_and_drawings_seen_before():
    concepts = list(icon_sets._join(*small_sets()))
    assert [c.name for c in concepts] == [
        "red apple",
        "fox",
        "guitar",
    ]  # the wolf is drawn as the fox is
    apple = concepts[0]
    assert (apple.group, apple.concrete, apple.tags) == ("food-drink", True, ("fruit",))
    assert set(apple.pictures) == set(words.STYLES)
    assert apple.pictures["noto"].source == "@iconify-json/noto@1.2.9:red-apple"


def test_render_is_square_centred_and_on_white():
    icons = {"icons": {"a": square("#ff0000") | {"height": 8}}, "width": 16, "height": 16}
    icons["icons"]["a"]["body"] = '<rect width="16" height="8" fill="#ff0000"/>'
    image = tfds_builder.render(icon_sets._svg(icons, "a"), 32)
    assert image.shape == (32, 32, 3)
    np.testing.assert_array_equal(image[12:20], np.broadcast_to([255, 0, 0], (8, 32, 3)))
    np.testing.assert_array_equal(image[:7], 255)
    np.testing.assert_array_equal(image[25:], 255)


def test_a_mirrored_alias_is_mirrored():
    body = '<rect width="8" height="16" fill="black"/>'
    icons = {"icons": {"left": {"body": body}}, "aliases": {}, "width": 16, "height": 16}
    icons["aliases"]["right"] = {"parent": "left", "hFlip": True}
    left = tfds_builder.render(icon_sets._svg(icons, "left"), 16)
    right = tfds_builder.render(icon_sets._svg(icons, "right"), 16)
    assert left[8, 2].sum() == 0
    np.testing.assert_array_equal(left[:, ::-1], right)


def test_build_round_trip(tmp_path):
    concepts = list(icon_sets._join(*small_sets()))
    counts = write.build(tmp_path / "out", size=16, concepts=concepts)
    assert sum(counts.values()) == 18
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folder is left
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert {s: builder.info.splits[s].num_examples for s in SPLITS} == counts
    found = tfds_folder.load_arrays(tmp_path / "out", "train")
    apple = (found["concept"] == "red apple") & (found["style"] == "noto")
    (row,) = np.flatnonzero(apple)
    np.testing.assert_array_equal(found["image"][row], np.broadcast_to([255, 0, 0], (16, 16, 3)))
    assert found["captions"][row] == words.captions("red apple", "noto", ["fruit"])
    with pytest.raises(UserError, match="already there"):
        write.build(tmp_path / "out", size=16, concepts=concepts)
    write.build(tmp_path / "out", size=8, concepts=concepts, overwrite=True)
    assert tfds_folder.load_arrays(tmp_path / "out", "train")["image"].shape[1:] == (8, 8, 3)


def test_a_subset_alone_is_drawn(tmp_path):
    concepts = list(icon_sets._join(*small_sets()))
    same = dict(size=8, concepts=concepts)
    every = write.build(tmp_path / "all", **same)
    kept = write.build(tmp_path / "some", **same, subset="concrete,style=noto|twemoji")
    assert 0 < sum(kept.values()) < sum(every.values())
    for split in SPLITS:
        subset = "concrete,style=noto|twemoji"
        if split not in kept:
            with pytest.raises(UserError, match="no split"):
                tfds_folder.load_arrays(tmp_path / "some", split)
            continue
        theirs = tfds_folder.load_arrays(tmp_path / "all", split, subset)
        ours = tfds_folder.load_arrays(tmp_path / "some", split)
        names = [sorted(zip(x["concept_id"], x["style"], strict=True)) for x in (theirs, ours)]
        assert names[0] == names[1] and len(names[0]) == kept[split]
    told = (("stile=noto", "did you mean 'style'"), ("concrete=yes", "write concrete alone"))
    for subset, why in (*told, ("style=baroque", "keeps nothing")):
        with pytest.raises(UserError, match=why):
            write.build(tmp_path / "none", **same, subset=subset)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "some"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_build_never_replaces_what_is_no_dataset(tmp_path, overwrite):
    concepts = list(icon_sets._join(*small_sets()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("out", "file"):
        with pytest.raises(UserError, match=rf"/{name}: .*no dataset_info.json.*another --out$"):
            write.build(tmp_path / name, size=8, concepts=concepts, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"
    (tmp_path / "empty").mkdir()
    write.build(tmp_path / "empty", size=8, concepts=concepts, overwrite=overwrite)
    assert (tmp_path / "empty" / "dataset_info.json").is_file()


def test_held_out_pictures_are_not_those_of_training(tmp_path):
    """Other SVG, the same pixels: the large orange diamond in black and white is the blue one."""
    entries, groups, sets = small_sets()
    for style in sets:  # the guitar is held out in all of them, and looks like noto's red apple
        color = "blue" if style == "twemoji" else "#f00"
        sets[style]["icons"]["icons"]["guitar"] = square(color)
    concepts = list(icon_sets._join(entries, groups, sets))
    counts = write.build(tmp_path / "out", size=8, concepts=concepts)
    assert sum(counts.values()) == 13
    found = tfds_folder.load_arrays(tmp_path / "out", "held_out_concepts")
    assert list(found["style"]) == ["twemoji"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), tf.errors.ResourceExhaustedError(None, None, "No space left")],
)
def test_build_that_fails_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, error):
    concepts = list(icon_sets._join(*small_sets()))
    write.build(tmp_path / "out", size=8, concepts=concepts)

    def full(svg, size):
        raise error

    monkeypatch.setattr(tfds_builder, "render", full)
    with pytest.raises(UserError, match="disk is full"):
        write.build(tmp_path / "out", size=16, concepts=concepts, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tfds_folder.load_arrays(tmp_path / "out", "train")["image"].shape[1:] == (8, 8, 3)


def test_build_into_a_bucket_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^gs://b/emoji: .*gcloud storage cp -r FOLDER gs://b/em"):
        write.build("gs://b/emoji")
    assert not (tmp_path / "gs:").exists()


def test_build_looks_at_the_free_space_first(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: type("U", (), {"free": 100}))
    concepts = list(icon_sets._join(*small_sets()))
    with pytest.raises(UserError, match="disk is full: about"):
        write.build(tmp_path / "out", size=64, concepts=concepts)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--out=file", "file: not a TFDS directory"),
        ("--sise=4", "'sise'. Did you mean: size ?"),
        ("--size=4", "--size=4"),
        ("data", "unknown argument 'data'"),
    ],
)
def test_command_prints_one_line_and_exits_2(tmp_path, argument, said):
    (tmp_path / "file").write_text("here")
    argument = argument.replace("=file", f"={tmp_path / 'file'}")
    command = [sys.executable, *MAIN, "data", "emoji", argument]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert said in line


@pytest.fixture(scope="module")
def fixture():
    return {split: tfds_folder.load_arrays(FIXTURE, split) for split in SPLITS}


def test_fixture_is_small_and_whole(fixture):
    assert sum(p.stat().st_size for p in FIXTURE.iterdir()) < 300_000
    assert sum(len(f["image"]) for f in fixture.values()) <= 64
    for split in ("train", "held_out_concepts"):
        assert set(fixture[split]["style"]) == set(words.STYLES)
    assert {False, True} <= set(fixture["train"]["concrete"].tolist())


def test_fixture_does_not_leak(fixture):
    pairs = {s: set(zip(f["concept_id"], f["style"], strict=True)) for s, f in fixture.items()}
    trained = {concept for concept, _ in pairs["train"]}
    assert not pairs["train"] & pairs["held_out_pairs"]
    assert {concept for concept, _ in pairs["held_out_pairs"]} <= trained
    assert not trained & {concept for concept, _ in pairs["held_out_concepts"]}
    pixels = {s: {image.tobytes() for image in f["image"]} for s, f in fixture.items()}
    assert not pixels["train"] & (pixels["held_out_pairs"] | pixels["held_out_concepts"])


def test_fixture_captions_name_concept_and_style(fixture):
    for found in fixture.values():
        for concept, style, texts in zip(
            found["concept"], found["style"], found["captions"], strict=True
        ):
            assert len(texts) == words.CAPTIONS_PER_PICTURE
            for text in texts:
                assert concept in text
                assert words.STYLES[style].short in text


def test_fixture_records_source_and_licence(fixture):
    for source, style, spdx in zip(
        *(fixture["train"][k] for k in ("source", "style", "license")), strict=True
    ):
        assert source.startswith(f"{icon_sets.PACKAGES[style].pin}:")
        assert spdx in ("Apache-2.0", "CC-BY-4.0", "MIT")


def test_high_contrast_is_grey(fixture):
    train = fixture["train"]
    image = train["image"][train["style"] == "fluent-emoji-high-contrast"].astype(int)
    assert np.ptp(image, axis=-1).max() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(path="nowhere"), "no such folder"),
        (dict(path=str(FIXTURE.parent)), "not a TFDS directory"),
        (dict(split="test"), "no split 'test'; there are"),
        (dict(subset="concret"), "did you mean 'concrete'"),
        (dict(subset="style=gothic"), "empty"),
        (dict(subset="style=noto,style=twemoji"), r"'style' stands twice; .* style=A\|B"),
        (dict(subset="concrete,concrete"), "'concrete' stands twice"),
        (dict(subset="concrete=True"), "'concrete' is true or false: write concrete alone"),
        (dict(subset="style"), r"'style' is text: write style=A or style=A\|B"),
        (dict(subset="tags=a|b"), r"'tags' is neither one text nor true or false"),
        (dict(subset="image"), "'image' is neither one text nor true or false"),
    ],
)
def test_load_errors(change, match):
    with pytest.raises(UserError, match=match):
        tfds_folder.load_arrays(**(dict(path=FIXTURE, split="train") | change))


def test_subset_and_size():
    found = tfds_folder.load_arrays(FIXTURE, "train", "concrete,style=noto|twemoji", image_size=16)
    assert found["image"].shape[1:] == (16, 16, 3)
    assert found["concrete"].all()
    assert set(found["style"]) == {"noto", "twemoji"}


def test_damaged_shard_is_named(tmp_path):
    for file in FIXTURE.iterdir():
        data = file.read_bytes()
        cut = data[: len(data) // 2] if "train" in file.name else data
        (tmp_path / file.name).write_bytes(cut)
    with pytest.raises(UserError, match="'train' is damaged"):
        tfds_folder.load_arrays(tmp_path, "train")
