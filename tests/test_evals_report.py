import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_judge
from command import MAIN
from PIL import Image

from dalle2_jax.data.emoji.words import STYLES
from dalle2_jax.errors import UserError
from dalle2_jax.evals import draw, report
from dalle2_jax.evals.groups import Group, read_groups
from dalle2_jax.evals.judge import Judge

ROOT = Path(__file__).parent.parent
FIXTURE = Path(__file__).parent / "fixtures" / "emoji"
CONCEPTS = [f"thing {i}" for i in range(8)]


class Oracle:
    """Knows what a picture shows: its first pixel's red is the concept, its green the style."""

    def embed(self, concepts, styles):
        z = np.eye(len(CONCEPTS))[concepts], np.eye(len(STYLES))[styles]
        return np.concatenate(z, axis=1) / 2**0.5

    def embed_pairs(self, pairs):
        styles = list(STYLES)
        return self.embed(
            [CONCEPTS.index(c) for c, _ in pairs], [styles.index(s) for _, s in pairs]
        )

    def embed_pictures(self, pictures):
        return self.embed(pictures[:, 0, 0, 0], pictures[:, 0, 0, 1])

    def embed_captions(self, captions):
        place = np.arange(len(captions))  # in the order of oracle_group
        return self.embed(place // len(STYLES) % len(CONCEPTS), place % len(STYLES))


def oracle_group():
    pairs = [(c, s) for c in CONCEPTS for s in STYLES]
    pictures = np.zeros((len(pairs), 2, 2, 3), np.uint8)
    pictures[:, 0, 0, 0] = np.arange(len(pairs)) // len(STYLES)
    pictures[:, 0, 0, 1] = np.arange(len(pairs)) % len(STYLES)
    return Group("held-out pairs", pairs, pictures)


def other(channel, count):
    """Draws the true pictures but for another concept (0) or style (1)."""

    def pictures(group):
        changed = group.pictures.copy()
        changed[:, 0, 0, channel] = (changed[:, 0, 0, channel] + 1) % count
        return changed

    return pictures


def test_scores_are_what_the_pictures_show():
    draws = {
        "right": lambda group: group.pictures,
        "other style": other(1, len(STYLES)),
        "other concept": other(0, len(CONCEPTS)),
        "all one": lambda group: np.zeros_like(group.pictures),
    }
    found, drawn = report.evaluate(Oracle(), [oracle_group()], CONCEPTS, draws, seed=0)
    group = found["held-out pairs"]
    got = {row: (score["concept"], score["style"]) for row, score in group["scores"].items()}
    assert got["right"] == got["true pictures"] == (100.0, 100.0)
    assert got["other style"] == (100.0, 0.0)
    assert got["other concept"] == (0.0, 100.0)
    assert got["all one"] == pytest.approx((100 / len(CONCEPTS), 100 / len(STYLES)))
    # By chance: the captions of the other half, of other things in the same styles.
    chance = {"concept": 100 / len(CONCEPTS), "style": 100 / len(STYLES), "clip_score": 50.0}
    assert group["chance"] == pytest.approx(chance)
    assert group["scores"]["right"]["clip_score"] == pytest.approx(100.0)
    assert group["scores"]["right"]["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert group["scores"]["all one"]["frechet_distance"] > 1.0
    # One style is nearer than the asked one, the four others are as far: a tie counts against.
    assert group["items"][0]["other style"]["style_rank"] == len(STYLES)
    assert set(drawn["held-out pairs"]) == set(draws)


def test_too_few_pictures_are_refused():
    draws = {"generated": lambda group: group.pictures[1:]}
    with pytest.raises(ValueError, match="generated"):
        report.evaluate(Oracle(), [oracle_group()], CONCEPTS, draws, seed=0)


@pytest.fixture(scope="module")
def groups():
    return read_groups(FIXTURE, "", num=6, seed=0)


def test_groups_are_drawn_from_their_splits(groups):
    from dalle2_jax.data.sources.tfds_folder import load_arrays

    (seen, pairs, concepts), pool = groups
    assert [g.name for g in (seen, pairs, concepts)] == [
        "seen pairs",
        "held-out pairs",
        "held-out concepts",
    ]
    for group, split in ((seen, "train"), (pairs, "held_out_pairs")):
        arrays = load_arrays(FIXTURE, split)
        there = list(zip(arrays["concept"], arrays["style"], strict=True))
        assert len(set(group.pairs)) == 6 and set(group.pairs) <= set(there)
        for pair, picture in zip(group.pairs, group.pictures, strict=True):
            np.testing.assert_array_equal(picture, arrays["image"][there.index(pair)])
    assert set(pairs.pairs).isdisjoint(train_pairs())
    assert {c for c, _ in concepts.pairs} == {"guitar"}
    assert len(pool) == 10 and "guitar" in pool
    assert concepts.captions[0].endswith("guitar")


def train_pairs():
    (seen, _, _), _ = read_groups(FIXTURE, "", num=1000, seed=0)
    return seen.pairs


def test_a_larger_number_asks_for_the_same_and_more(groups):
    (seen, _, _), _ = read_groups(FIXTURE, "", num=20, seed=0)
    assert seen.pairs[:6] == groups[0][0].pairs
    (again, _, _), _ = read_groups(FIXTURE, "", num=6, seed=1)
    assert again.pairs != groups[0][0].pairs


def test_subset_is_applied():
    (seen, _, _), pool = read_groups(FIXTURE, "concrete", num=100, seed=0)
    assert "kiss mark" not in pool and "kiss mark" not in {c for c, _ in seen.pairs}


def test_true_pictures_reach_the_ceiling_exactly(groups, tmp_path):
    judge = Judge.load(small_judge.write(tmp_path / "judge"), batch_size=4)
    draws = {"generated": lambda group: group.pictures.copy()}
    found, drawn = report.evaluate(judge, *groups, draws, seed=0)
    assert set(found) == {"seen pairs", "held-out pairs", "held-out concepts"}
    for group in found.values():
        assert group["scores"]["generated"] == group["scores"]["true pictures"]
        assert group["candidates"] == 10
    group = groups[0][1]
    grid = report.held_out_grid(group, drawn[group.name]["generated"])
    report.write(tmp_path, {"seed": 0}, found, grid)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["groups"] == found and written["about"] == {"seed": 0}
    table = (tmp_path / "report.md").read_text().split("\n\n")[0].splitlines()
    assert len(table) == 2 + 3 * 3 and len({line.count("|") for line in table}) == 1
    with Image.open(tmp_path / "held_out_pairs.png") as image:
        assert image.width > 8 * 64


@pytest.fixture(scope="module")
def model(folder):
    from dalle2_jax.pipelines.dalle2 import DALLE2

    return DALLE2.from_pretrained(folder)


def test_drawing_gives_a_picture_a_caption_whatever_stands_beside_it(model, groups):
    group, counts = groups[0][0], []
    same = dict(seed=3, batch_size=4, progress=counts.append)
    drawn = draw.generate(model, group.captions, **same)
    assert drawn.shape == (6, 16, 16, 3) and drawn.dtype == np.uint8 and sum(counts) == 6
    z_img = model.encode_image(group.pictures)
    rebuilt = draw.generate(model, group.captions, **same, z_img=z_img)
    assert rebuilt.shape == drawn.shape and rebuilt.dtype == np.uint8 and sum(counts) == 12
    assert not np.array_equal(rebuilt, drawn)
    other = dict(same, batch_size=16)
    for last in (slice(5, 6), slice(2, 6)):
        captions = group.captions[last]
        alone = draw.generate(model, captions, **other).astype(int)
        assert np.abs(alone - drawn[last]).max() <= 1  # another batch rounds otherwise
        alone = draw.generate(model, captions, **other, z_img=z_img[last]).astype(int)
        assert np.abs(alone - rebuilt[last]).max() <= 1
    again = draw.generate(model, [group.captions[0]] * 2, **other)
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], draw.generate(model, group.captions[:1], 4, 4, print)[0])


def evals(*flags):
    command = [sys.executable, *MAIN, "evals", "report", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_line(folder, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    flags = ["--weights", folder, "--data", str(FIXTURE), "--subset=", "--num=3"]
    done = evals(*flags, "--judge", judge, "--out", str(tmp_path / "out"), "--reconstruct")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {"generated", "from the true z_img", "true pictures"}
    assert all(set(group["scores"]) == rows for group in written["groups"].values())
    assert written["about"]["settings"]["decoder"]["steps"] == 4
    assert (tmp_path / "out" / "held_out_pairs.png").is_file()
    assert (tmp_path / "out" / "report.md").read_text().startswith("| |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num=0"], "--num=0 must be 1 or more"),
        (["--nmu=3"], "nmu"),
        (["--judge=/nowhere"], "configs/clip.py:judge"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, tmp_path):
    done = evals("--out", str(tmp_path), *flags)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_data_set_without_styles_is_told(monkeypatch):
    from dalle2_jax.data.sources import tfds_folder

    arrays = {"image": np.zeros((1, 4, 4, 3), np.uint8)}
    monkeypatch.setattr(tfds_folder, "load_arrays", lambda *_, **__: arrays)
    with pytest.raises(UserError, match="concept"):
        read_groups("x", "", 1, 0)
    arrays |= {"concept": np.array(["fox"]), "style": np.array(["baroque"])}
    with pytest.raises(UserError, match="unknown style 'baroque'"):
        read_groups("x", "", 1, 0)
