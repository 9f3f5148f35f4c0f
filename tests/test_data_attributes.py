"""Backgrounds and mirroring while training: what is shown, what the caption says, which order."""

import functools
import itertools
import pathlib
import re

import numpy as np
import pytest

from dalle2_jax.data import attributes, pipeline
from dalle2_jax.data.sources import tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
FIXTURE = str(FIXTURES / "emoji_attributes")
CONTEXT, VOCAB = 77, 49408
BATCH = 8
SHARES = dict(background_share=0.6, mirror_share=0.4)
STREAM = dict(ram_gb=0.0)
BACKGROUND = re.compile(
    rf"( on| against|,)( an?)? ({'|'.join(attributes.NAMED)})( backg.*| backd.*)?$"
)
MIRROR = re.compile(r"^mirror image of |, mirrored|, flipped|, facing the other way")
MIRROR_WORDS = re.compile(r"mirror|flipped|facing the other way")
COLOR_WORDS = re.compile(rf"\b({'|'.join(attributes.NAMED)})\b (background|backdrop)|on (\w+)$")


def dataset(batch_size=BATCH, rows=None, **changes):
    config = dict(path=FIXTURE, image_size=32, context_length=CONTEXT, vocab_size=VOCAB)
    return pipeline.make_dataset(config | SHARES | changes, batch_size=batch_size, rows=rows)


def take(batches, count, start=0):
    return list(itertools.islice(batches(start), count))


@functools.cache
def tokenizer():
    return Tokenizer(CONTEXT, VOCAB)


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in ("image", "tokens"):
            np.testing.assert_array_equal(a[key], b[key])


def letters(text):
    """A text without what tokens do not keep."""
    return re.sub(r"[^a-z0-9]", "", text)


def color_of(image):
    """The name of the colour in the top right corner, which these drawings leave clear."""
    distances = {name: np.abs(image[0, -1] - np.array(c)) for name, c in attributes.COLORS.items()}
    return min(distances, key=lambda name: distances[name].sum())


def color_named(text):
    found = COLOR_WORDS.search(text)
    return (found.group(1) or found.group(3)) if found else attributes.WHITE


def test_paint_mixes_by_alpha():
    image = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], np.uint8)
    painted = attributes.paint(image, "blue")
    assert painted[0, :2].tolist() == [[200, 100, 0], list(attributes.COLORS["blue"])]
    expected = 128 / 255 * np.array([200, 100, 0]) + 127 / 255 * np.array(attributes.COLORS["blue"])
    np.testing.assert_allclose(painted[0, 2], expected, atol=0.5)


@pytest.mark.parametrize("wording", range(len(attributes.BACKGROUND_WORDINGS)))
def test_every_wording_names_the_color(wording):
    text = attributes.name_background("a fox", "orange", wording)
    assert text.startswith("a fox")
    assert color_named(text) == "orange"
    assert "a orange" not in text
    assert attributes.name_background("a fox", "white", wording) == "a fox"


@pytest.mark.parametrize("wording", range(len(attributes.MIRROR_WORDINGS)))
def test_every_wording_says_that_an_image_is_mirrored(wording):
    choice = attributes.Choice(mirrored=True, mirror_wording=wording)
    assert MIRROR_WORDS.search(choice.describe("a fox"))
    assert not choice.is_plain


def test_shares_are_as_asked_for():
    rng = np.random.default_rng(0)
    shares = attributes.Shares(background=0.3, mirror=0.2)
    choices = [shares.choose(rng.random(5), ["red", "blue"], True) for _ in range(4000)]
    colors = [c.background for c in choices]
    assert colors.count("white") / 4000 == pytest.approx(0.7, abs=0.03)
    assert colors.count("red") / 4000 == pytest.approx(0.15, abs=0.03)
    assert np.mean([c.mirrored for c in choices]) == pytest.approx(0.2, abs=0.03)
    wordings = {c.background_wording for c in choices}
    assert wordings == set(range(len(attributes.BACKGROUND_WORDINGS)))
    assert all(shares.choose(rng.random(5), [], False).is_plain for _ in range(100))


def test_the_longest_addition_is_the_longest():
    def length(choice):
        return tokenizer().length(choice.describe("a fox"))

    every = itertools.product(attributes.NAMED, [True], range(4), range(4))
    assert max(length(attributes.Choice(*c)) for c in every) == length(
        attributes.longest_addition()
    )


@pytest.mark.parametrize("way", [{}, STREAM], ids=str)
def test_what_a_caption_says_is_what_the_image_shows(way):
    arrays = tfds_folder.load_arrays(FIXTURE, "train")
    by_caption = {}
    for row, texts in enumerate(arrays["captions"]):
        for text in texts:
            by_caption.setdefault(letters(text), []).append(row)
    colors, mirrored, count = set(), 0, 0
    for batch in take(dataset(**way), 25):
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
            text = tokenizer().decode(tokens).replace(" ,", ",")
            color, is_mirrored = color_named(text), MIRROR_WORDS.search(text) is not None
            rows = by_caption.get(letters(BACKGROUND.sub("", MIRROR.sub("", text))))
            assert rows, text
            shown = image[:, ::-1] if is_mirrored else image
            encoded = [_painted(row)[color] for row in rows]
            assert any(np.array_equal(shown, e) for e in encoded), text
            if color != attributes.WHITE:
                assert any(color in arrays["backgrounds"][row] for row in rows)
            if is_mirrored:
                assert any(arrays["mirrorable"][row] for row in rows)
            colors.add(color)
            mirrored += is_mirrored
            count += 1
    assert len(colors) == len(attributes.COLORS)
    assert 0.05 < mirrored / count < 0.4


@functools.cache
def _records():
    return tfds_folder.read_records(tfds_folder.open_split(FIXTURE, "train"))


@functools.cache
def _painted(row):
    drawing = tfds_folder.decode.decode(_records()[row]["image"], keep_alpha=True)
    return {color: attributes.paint(drawing, color) for color in attributes.COLORS}


@pytest.mark.parametrize("way", [{}, STREAM, dict(group_by="concept")], ids=str)
def test_resume_is_exact(way):
    batches = take(dataset(**way), 16)  # more than two epochs
    again = dataset(**way)
    for start in (0, 7, 13):
        assert_same(batches[start : start + 3], take(again, 3, start))


@pytest.mark.parametrize("way", [{}, dict(STREAM, stream_parts=4)], ids=str)
def test_hosts_share_each_batch(way):
    batches = take(dataset(**way), 7)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        host = take(dataset(rows=np.array(rows), **way), 7)
        assert_same(host, [{key: value[rows] for key, value in b.items()} for b in batches])


def test_without_shares_images_are_on_white_and_the_order_is_the_same():
    plain = take(dataset(background_share=0.0, mirror_share=0.0), 4)
    varied = take(dataset(), 4)
    agree = [
        np.array_equal(a, b)
        for x, y in zip(plain, varied, strict=True)
        for a, b in zip(x["tokens"], y["tokens"], strict=True)
    ]
    assert 0.1 < np.mean(agree) < 0.9  # those that got no attribute
    for x, y in zip(plain, varied, strict=True):
        for row in range(BATCH):
            if np.array_equal(x["tokens"][row], y["tokens"][row]):
                np.testing.assert_array_equal(x["image"][row], y["image"][row])


def test_crops_keep_the_alpha():
    for batch in take(dataset(crop_scale=(0.5, 0.9), image_size=16, background_share=1.0), 3):
        assert batch["image"].shape == (BATCH, 16, 16, 3)
        assert {color_of(image) for image in batch["image"]} - {"white"}


def test_flip_leaves_what_has_a_direction():
    arrays = tfds_folder.load_arrays(FIXTURE, "train")
    fixed = {
        image.tobytes()
        for image, can_mirror in zip(arrays["image"], arrays["mirrorable"], strict=True)
        if not can_mirror
    }
    plain, flipped = (
        take(dataset(background_share=0.0, mirror_share=0.0, flip=flip), 14)
        for flip in (False, True)
    )
    changed = 0
    for a, b in zip(plain, flipped, strict=True):
        for x, y in zip(a["image"], b["image"], strict=True):
            if x.tobytes() in fixed:
                np.testing.assert_array_equal(x, y)
            changed += not np.array_equal(x, y)
    assert changed


def test_captions_that_their_attributes_make_too_long_are_reported(caplog):
    def share():
        (line,) = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return float(re.search(r"captions \((.*)%\) are longer than context_length=16", line)[1])

    dataset(context_length=16, background_share=0.0, mirror_share=0.0)
    assert not caplog.records
    dataset(context_length=16, background_share=1.0, mirror_share=0.0)
    every = share()
    dataset(context_length=16, background_share=0.3, mirror_share=0.0)
    assert 0 < share() < every / 2
    dataset(context_length=40)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(background_share=1.5),
            "config.data.background_share must be a number from 0 to 1, not 1.5",
        ),
        (
            dict(mirror_share=-0.1),
            "config.data.mirror_share must be a number from 0 to 1, not -0.1",
        ),
        (dict(mirror_share="half"), "config.data.mirror_share must be a number, not 'half'"),
        (dict(flip=True), "both mirror images: set --config.data.noflip or"),
        (
            dict(path=str(FIXTURES / "emoji")),
            "no feature 'backgrounds', which config.data.background_share=0.6 needs: .*`make data`",
        ),
        (
            dict(path=str(FIXTURES / "emoji"), background_share=0.0),
            "no feature 'mirrorable', which config.data.mirror_share=0.4 needs",
        ),
        (dict(source="folder"), "background_share=0.6 is for the emoji set, not for a folder"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        dataset(**change)
    assert "\n" not in str(error.value)
