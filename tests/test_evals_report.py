import json
from pathlib import Path

import numpy as np
import pytest
import small_judge
from command import MAIN, run
from PIL import Image

from dalle2_jax.data.emoji.words import STYLES
from dalle2_jax.errors import UserError
from dalle2_jax.evals import generation, report
from dalle2_jax.evals.groups import Group, read_groups
from dalle2_jax.evals.judge import Judge

FIXTURE = Path(__file__).parent / "fixtures" / "emoji"
CONCEPTS = [f"thing {i}" for i in range(8)]


class Oracle:
    """Reads an image without error: its first pixel's red is the concept, its green the style."""

    def embed(self, concepts, styles):
        z = np.eye(len(CONCEPTS))[concepts], np.eye(len(STYLES))[styles]
        return np.concatenate(z, axis=1) / 2**0.5

    def embed_pairs(self, pairs):
        styles = list(STYLES)
        return self.embed(
            [CONCEPTS.index(c) for c, _ in pairs], [styles.index(s) for _, s in pairs]
        )

    def embed_images(self, images):
        return self.embed(images[:, 0, 0, 0], images[:, 0, 0, 1])

    def embed_captions(self, captions):
        place = np.arange(len(captions))  # in the order of oracle_group
        return self.embed(place // len(STYLES) % len(CONCEPTS), place % len(STYLES))


def oracle_group():
    pairs = [(c, s) for c in CONCEPTS for s in STYLES]
    images = np.zeros((len(pairs), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(pairs)) // len(STYLES)
    images[:, 0, 0, 1] = np.arange(len(pairs)) % len(STYLES)
    return Group("held-out pairs", pairs, images)


def other(channel, count):
    """Returns a generator of the true images with another concept (0) or style (1)."""

    def generate(group):
        changed = group.images.copy()
        changed[:, 0, 0, channel] = (changed[:, 0, 0, channel] + 1) % count
        return changed

    return generate


def test_scores_say_what_the_images_show():
    generators = {
        "right": lambda group: group.images,
        "other style": other(1, len(STYLES)),
        "other concept": other(0, len(CONCEPTS)),
        "all one": lambda group: np.zeros_like(group.images),
    }
    scores, images = report.evaluate(Oracle(), [oracle_group()], CONCEPTS, generators, seed=0)
    group = scores["held-out pairs"]
    shares = {row: (score["concept"], score["style"]) for row, score in group["scores"].items()}
    assert shares["right"] == shares["true images"] == (100.0, 100.0)
    assert shares["other style"] == (100.0, 0.0)
    assert shares["other concept"] == (0.0, 100.0)
    assert shares["all one"] == pytest.approx((100 / len(CONCEPTS), 100 / len(STYLES)))
    # Chance pairs each image with a caption of the other half: other concepts in the same styles.
    chance = {"concept": 100 / len(CONCEPTS), "style": 100 / len(STYLES), "clip_score": 50.0}
    assert group["chance"] == pytest.approx(chance)
    assert group["scores"]["right"]["clip_score"] == pytest.approx(100.0)
    assert group["scores"]["right"]["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert group["scores"]["all one"]["frechet_distance"] > 1.0
    # One style is nearer than the target, all others tie with it, and a tie counts against it.
    assert group["items"][0]["other style"]["style_rank"] == len(STYLES)
    assert set(images["held-out pairs"]) == set(generators)


def test_too_few_images_are_refused():
    generators = {"generated": lambda group: group.images[1:]}
    with pytest.raises(ValueError, match="generated"):
        report.evaluate(Oracle(), [oracle_group()], CONCEPTS, generators, seed=0)


@pytest.fixture(scope="module")
def groups():
    return read_groups(FIXTURE, "", num=6, seed=0)


def test_groups_come_from_their_splits(groups):
    from dalle2_jax.data.sources.tfds_folder import load_arrays

    (seen, pairs, concepts), names = groups
    assert [g.name for g in (seen, pairs, concepts)] == [
        "seen pairs",
        "held-out pairs",
        "held-out concepts",
    ]
    for group, split in ((seen, "train"), (pairs, "held_out_pairs")):
        arrays = load_arrays(FIXTURE, split)
        split_pairs = list(zip(arrays["concept"], arrays["style"], strict=True))
        assert len(set(group.pairs)) == 6 and set(group.pairs) <= set(split_pairs)
        for pair, image in zip(group.pairs, group.images, strict=True):
            np.testing.assert_array_equal(image, arrays["image"][split_pairs.index(pair)])
    assert set(pairs.pairs).isdisjoint(train_pairs())
    assert {c for c, _ in concepts.pairs} == {"guitar"}
    assert len(names) == 10 and "guitar" in names
    assert concepts.captions[0].endswith("guitar")


def train_pairs():
    (seen, _, _), _ = read_groups(FIXTURE, "", num=1000, seed=0)
    return seen.pairs


def test_a_larger_number_gives_the_same_pairs_and_more(groups):
    (seen, _, _), _ = read_groups(FIXTURE, "", num=20, seed=0)
    assert seen.pairs[:6] == groups[0][0].pairs
    (again, _, _), _ = read_groups(FIXTURE, "", num=6, seed=1)
    assert again.pairs != groups[0][0].pairs


def test_subset_is_applied():
    (seen, _, _), names = read_groups(FIXTURE, "concrete", num=100, seed=0)
    assert "kiss mark" not in names and "kiss mark" not in {c for c, _ in seen.pairs}


def test_true_images_reach_the_ceiling_exactly(groups, tmp_path):
    judge = Judge.load(small_judge.write(tmp_path / "judge"), batch_size=4)
    generators = {"generated": lambda group: group.images.copy()}
    scores, images = report.evaluate(judge, *groups, generators, seed=0)
    assert set(scores) == {"seen pairs", "held-out pairs", "held-out concepts"}
    for group in scores.values():
        assert group["scores"]["generated"] == group["scores"]["true images"]
        assert group["candidates"] == 10
    group = groups[0][1]
    grid = report.held_out_grid(group, images[group.name]["generated"])
    report.write(tmp_path, {"seed": 0}, scores, grid)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["groups"] == scores and written["about"] == {"seed": 0}
    table = (tmp_path / "report.md").read_text().split("\n\n")[0].splitlines()
    assert len(table) == 2 + 3 * 3 and len({line.count("|") for line in table}) == 1
    with Image.open(tmp_path / "held_out_pairs.png") as image:
        assert image.width > 8 * 64


@pytest.fixture(scope="module")
def model(folder):
    from dalle2_jax.pipelines.dalle2 import DALLE2

    return DALLE2.from_pretrained(folder)


def test_an_image_depends_on_its_caption_and_the_seed_alone(model, groups):
    group, counts = groups[0][0], []
    same = dict(seed=3, batch_size=4, progress=counts.append)
    images = generation.generate(model, group.captions, **same)
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8 and sum(counts) == 6
    z_img = model.encode_image(group.images)
    decoded = generation.generate(model, group.captions, **same, z_img=z_img)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8 and sum(counts) == 12
    assert not np.array_equal(decoded, images)
    other = dict(same, batch_size=16)
    for last in (slice(5, 6), slice(2, 6)):
        captions = group.captions[last]
        alone = generation.generate(model, captions, **other).astype(int)
        assert np.abs(alone - images[last]).max() <= 1  # rounding differs between batch sizes
        alone = generation.generate(model, captions, **other, z_img=z_img[last]).astype(int)
        assert np.abs(alone - decoded[last]).max() <= 1
    again = generation.generate(model, [group.captions[0]] * 2, **other)
    assert np.array_equal(*again)
    assert not np.array_equal(
        again[0], generation.generate(model, group.captions[:1], 4, 4, print)[0]
    )


def evals(*flags):
    return run(*MAIN, "evals", "report", *flags)


def test_command_line(folder, tmp_path):
    judge = small_judge.write(tmp_path / "judge")
    flags = ["--weights", folder, "--data", str(FIXTURE), "--subset=", "--num=3"]
    done = evals(*flags, "--judge", judge, "--out", str(tmp_path / "out"), "--reconstruct")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {"generated", "from the true z_img", "true images"}
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


def test_a_data_set_without_styles_is_refused(monkeypatch):
    from dalle2_jax.data.sources import tfds_folder

    arrays = {"image": np.zeros((1, 4, 4, 3), np.uint8)}
    monkeypatch.setattr(tfds_folder, "load_arrays", lambda *_, **__: arrays)
    with pytest.raises(UserError, match="concept"):
        read_groups("x", "", 1, 0)
    arrays |= {"concept": np.array(["fox"]), "style": np.array(["baroque"])}
    with pytest.raises(UserError, match="unknown style 'baroque'"):
        read_groups("x", "", 1, 0)
