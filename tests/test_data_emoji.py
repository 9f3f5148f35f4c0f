"""The emoji set: fetching, joining, building, and the fixture of real images, an older set."""

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

from dalle2_jax.data import attributes
from dalle2_jax.data.emoji import concepts, icon_sets, npm, render, splits, words, write
from dalle2_jax.data.sources import tfds_folder
from dalle2_jax.errors import UserError

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "emoji"
# Splits of the fixture, a part of the set as it was before version 2.0.
SPLITS = ("train", "held_out_pairs", "held_out_concepts")


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


def icon_set(style, icons, code_points=None):
    return icon_sets.IconSet(
        icons={"icons": icons, "width": 16, "height": 16},
        code_points=code_points or {},
        license="MIT",
        pin=icon_sets.PACKAGES[style].pin,
    )


def small_sets():
    """(emojibase, sets) whose icons are squares, as `concepts.join` takes them."""
    code_points = {"1f34e": "red-apple", "1f98a": "fox", "1f43a": "wolf", "1f3b8": "guitar"}
    # The guitar is a held-out concept: every split that TFDS is to write needs a record.
    colors = {"red-apple": "red", "fox": "orange", "wolf": "orange", "guitar": "brown"}
    sets = {}
    for i, style in enumerate(words.ALL_STYLES):
        icons = {name: square(color, 16 - i) for name, color in colors.items()}
        sets[style] = icon_set(style, icons, code_points)
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
    return concepts.Emojibase(entries, groups, {}), sets


def small_concepts():
    return list(concepts.join(*small_sets()))


def test_join_drops_flags_unknown_icons_and_drawings_seen_before():
    joined = small_concepts()
    # The wolf has the same drawing as the fox.
    assert [c.name for c in joined] == ["red apple", "fox", "guitar"]
    apple = joined[0]
    assert (apple.group, apple.concrete, apple.tags) == ("food-drink", True, ("fruit",))
    assert set(apple.drawings) == set(words.ALL_STYLES)
    assert apple.drawings["noto"].source == "@iconify-json/noto@1.2.9:red-apple"


def test_join_leaves_out_what_fewer_than_four_trainable_styles_draw():
    base, sets = small_sets()
    evaluation = list(words.EVALUATION_STYLES)
    for count, names in ((3, []), (4, ["red apple", "fox", "guitar"])):
        styles = [*list(words.STYLES)[:count], *evaluation]
        few = {style: sets[style] for style in styles}
        assert [c.name for c in concepts.join(base, few)] == names


@pytest.mark.parametrize(
    ("icon", "concept"),
    [
        ("alarmclock", "alarm clock"),  # its own name, written together
        ("blackrightwardsarrow", "right arrow"),  # Unicode's name
        ("reloj", "alarm clock"),  # an alias in a set with code points
        ("alarm-clock-1", "alarm clock"),  # the first of several
        ("dog", "dog face"),  # an exception of fxemoji: its dog is a face
        ("foxgrin", None),
    ],
)
def test_sets_without_code_points_are_joined_by_name(icon, concept):
    entries = [
        {"label": "alarm clock", "hexcode": "23F0", "order": 1, "group": 4, "subgroup": 1},
        {"label": "right arrow", "hexcode": "27A1-FE0F", "order": 2, "group": 4, "subgroup": 1},
        {"label": "dog face", "hexcode": "1F436", "order": 3, "group": 4, "subgroup": 1},
        {"label": "dog", "hexcode": "1F415", "order": 4, "group": 4, "subgroup": 1},
    ]
    groups = {"groups": {"4": "objects"}, "subgroups": {"1": "tool"}}
    base = concepts.Emojibase(entries, groups, {"27A1": ["BLACK RIGHTWARDS ARROW"]})
    code_points = {"23f0": "alarm", "27a1": "right", "1f436": "dog-face", "1f415": "dog"}
    colors = {"alarm": "red", "right": "blue", "dog-face": "tan", "dog": "sienna"}
    sets = {}
    for style in list(words.STYLES)[:4]:
        icons = {name: square(color) for name, color in colors.items()}
        sets[style] = icon_set(style, icons, code_points)
        sets[style].icons["aliases"] = {"reloj": {"parent": "alarm"}}
    sets["fxemoji"] = icon_set("fxemoji", {icon: square("green")})
    joined = {c.name: c for c in concepts.join(base, sets)}
    assert len(joined) == 4
    with_icon = [name for name, c in joined.items() if "fxemoji" in c.drawings]
    assert with_icon == ([concept] if concept else [])


@pytest.mark.parametrize(
    ("label", "has_direction"),
    [
        ("fox", False),
        ("rocket", False),
        ("backhand index pointing left", True),
        ("man walking facing right", True),
        ("six o\u2019clock", True),
        ("waxing crescent moon", True),
        ("input latin letters", True),
        ("1st place medal", True),
    ],
)
def test_names_that_say_a_direction_are_not_mirrored(label, has_direction):
    base, sets = small_sets()
    entry = {"label": label, "hexcode": "1F98A", "order": 1, "group": 3, "subgroup": 34}
    (concept,) = concepts.join(concepts.Emojibase([entry], base.groups, {}), sets)
    assert concept.has_direction == has_direction


def test_render_is_square_centred_and_clear_around():
    body = '<rect width="16" height="8" fill="#ff0000"/>'
    icons = {"a": {"body": body, "height": 8}}
    image = render.render(icon_set("noto", icons).svg("a"), 32)
    assert image.shape == (32, 32, 4)
    np.testing.assert_array_equal(image[12:20], np.broadcast_to([255, 0, 0, 255], (8, 32, 4)))
    assert not image[:7, :, 3].any()
    assert not image[25:, :, 3].any()


def test_a_mirrored_alias_is_mirrored():
    icons = {"left": {"body": '<rect width="8" height="16" fill="black"/>'}}
    icons = icon_set("noto", icons)
    icons.icons["aliases"] = {"right": {"parent": "left", "hFlip": True}}
    left = render.render(icons.svg("left"), 16)
    right = render.render(icons.svg("right"), 16)
    assert left[8, 2].tolist() == [0, 0, 0, 255]
    np.testing.assert_array_equal(left[:, ::-1], right)
    assert icons.aliases_of("left") == []  # the mirror image is another drawing


def test_build_round_trip(tmp_path):
    joined = small_concepts()
    counts = write.build(tmp_path / "out", size=16, concepts=joined)
    assert counts["held_out_styles"] == 3 * 2
    assert counts["held_out_concepts"] == 10
    assert counts["train"] + counts["validation"] + counts["held_out_pairs"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary folder is left
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert {s: builder.info.splits[s].num_examples for s in splits.SPLITS} == counts
    arrays = tfds_folder.load_arrays(tmp_path / "out", "train")
    apple = (arrays["concept"] == "red apple") & (arrays["style"] == "noto")
    (row,) = np.flatnonzero(apple)
    np.testing.assert_array_equal(arrays["image"][row], np.broadcast_to([255, 0, 0], (16, 16, 3)))
    assert arrays["captions"][row] == words.captions("red apple", "noto", ["fruit"])
    assert arrays["backgrounds"][row] == []  # the square fills the image
    with pytest.raises(UserError, match="already there"):
        write.build(tmp_path / "out", size=16, concepts=joined)
    write.build(tmp_path / "out", size=8, concepts=joined, overwrite=True)
    assert tfds_folder.load_arrays(tmp_path / "out", "train")["image"].shape[1:] == (8, 8, 3)


def test_a_held_out_triple_is_opaque_and_named_in_its_captions(tmp_path):
    write.build(tmp_path / "out", size=16, concepts=small_concepts())
    arrays = tfds_folder.load_arrays(tmp_path / "out", "held_out_triples")
    assert len(arrays["image"])
    for image, color, texts in zip(
        arrays["image"], arrays["background"], arrays["captions"], strict=True
    ):
        assert color in attributes.NAMED
        assert tuple(image[0, -1]) == attributes.COLORS[color]
        assert texts[0].endswith(f" {color} background")
        assert all(color in text for text in texts)


def test_only_a_subset_is_rendered(tmp_path):
    joined = small_concepts()
    same = dict(size=8, concepts=joined)
    every = write.build(tmp_path / "all", **same)
    subset = "concrete,style=noto|twemoji"
    some = write.build(tmp_path / "some", **same, subset=subset)
    assert 0 < sum(some.values()) < sum(every.values())
    for split in every:
        if split not in some:
            with pytest.raises(UserError, match="no split"):
                tfds_folder.load_arrays(tmp_path / "some", split)
            continue
        theirs = tfds_folder.load_arrays(tmp_path / "all", split, subset)
        ours = tfds_folder.load_arrays(tmp_path / "some", split)
        names = [sorted(zip(x["concept_id"], x["style"], strict=True)) for x in (theirs, ours)]
        assert names[0] == names[1]
        assert len(names[0]) == some[split]
    mistakes = (
        ("stile=noto", "did you mean 'style'"),
        ("concrete=yes", "write concrete alone"),
        ("style=baroque", "keeps nothing"),
    )
    for subset, message in mistakes:
        with pytest.raises(UserError, match=message):
            write.build(tmp_path / "none", **same, subset=subset)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "some"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_build_never_replaces_what_is_no_dataset(tmp_path, overwrite):
    joined = small_concepts()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("out", "file"):
        with pytest.raises(UserError, match=rf"/{name}: .*no dataset_info.json.*another --out$"):
            write.build(tmp_path / name, size=8, concepts=joined, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"
    (tmp_path / "empty").mkdir()
    write.build(tmp_path / "empty", size=8, concepts=joined, overwrite=overwrite)
    assert (tmp_path / "empty" / "dataset_info.json").is_file()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), tf.errors.ResourceExhaustedError(None, None, "No space left")],
)
def test_build_that_fails_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, error):
    joined = small_concepts()
    write.build(tmp_path / "out", size=8, concepts=joined)

    def full(svg, size):
        raise error

    monkeypatch.setattr(render, "render", full)
    with pytest.raises(UserError, match="disk is full"):
        write.build(tmp_path / "out", size=16, concepts=joined, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tfds_folder.load_arrays(tmp_path / "out", "train")["image"].shape[1:] == (8, 8, 3)


def test_build_into_a_bucket_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^gs://b/emoji: .*gcloud storage cp -r FOLDER gs://b/em"):
        write.build("gs://b/emoji")
    assert not (tmp_path / "gs:").exists()


def test_build_looks_at_the_free_space_first(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: type("U", (), {"free": 100}))
    joined = small_concepts()
    with pytest.raises(UserError, match="disk is full: about"):
        write.build(tmp_path / "out", size=64, concepts=joined)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--out=file", "file: not a TFDS directory"),
        ("--sise=4", "'sise'. Did you mean: size ?"),
        ("--size=4", "--size=4"),
        ("data", "unknown argument 'data'"),
    ],
)
def test_command_prints_one_line_and_exits_2(tmp_path, argument, message):
    (tmp_path / "file").write_text("here")
    argument = argument.replace("=file", f"={tmp_path / 'file'}")
    command = [sys.executable, *MAIN, "data", "emoji", argument]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert message in line


@pytest.fixture(scope="module")
def fixture():
    return {split: tfds_folder.load_arrays(FIXTURE, split) for split in SPLITS}


def test_a_set_of_the_old_format_is_still_read(fixture):
    assert sum(len(arrays["image"]) for arrays in fixture.values()) <= 64
    old_styles = list(words.STYLES)[:6]
    assert set(fixture["train"]["style"]) == set(old_styles)
    assert {False, True} <= set(fixture["train"]["concrete"].tolist())
    for arrays in fixture.values():
        assert "backgrounds" not in arrays
        for concept, style, texts in zip(
            arrays["concept"], arrays["style"], arrays["captions"], strict=True
        ):
            assert texts[0] == words.caption(concept, style)


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
    arrays = tfds_folder.load_arrays(FIXTURE, "train", "concrete,style=noto|twemoji", image_size=16)
    assert arrays["image"].shape[1:] == (16, 16, 3)
    assert arrays["concrete"].all()
    assert set(arrays["style"]) == {"noto", "twemoji"}


def test_damaged_shard_is_named(tmp_path):
    for file in FIXTURE.iterdir():
        data = file.read_bytes()
        cut = data[: len(data) // 2] if "train" in file.name else data
        (tmp_path / file.name).write_bytes(cut)
    with pytest.raises(UserError, match="'train' is damaged"):
        tfds_folder.load_arrays(tmp_path, "train")
