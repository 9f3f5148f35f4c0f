"""Order, resume, hosts and what a batch holds, on a fixture of real images."""

import functools
import itertools
import math
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dalle2_jax.data import pipeline
from dalle2_jax.data.sources import tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.tokenizer import Tokenizer

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")
CONTEXT, VOCAB = 32, 2000
BATCH = 8


def dataset(batch_size=BATCH, rows=None, **changes):
    config = dict(path=FIXTURE, image_size=64, context_length=CONTEXT, vocab_size=VOCAB)
    return pipeline.make_dataset(config | changes, batch_size=batch_size, rows=rows)


@functools.cache
def _shared(items):
    return dataset(**dict(items))


def shared(**way):
    """`dataset`, opened once for all tests that ask for the same."""
    return _shared(tuple(way.items()))


def take(batches, count, start=0):
    return list(itertools.islice(batches(start), count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b) == {"image", "tokens"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


STREAM = dict(ram_gb=0.0)
EVERY_WAY = [
    {},
    STREAM,
    dict(flip=True),
    dict(crop_scale=(0.3, 0.9), image_size=16),
    dict(subset="concrete", shuffle_seed=3),
    dict(group_by="style"),
    dict(STREAM, subset="concrete", crop_scale=(0.5, 0.5), image_size=32, flip=True),
    dict(STREAM, stream_parts=2, subset="concrete"),
]


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_resume_is_exact(way):
    batches = take(shared(**way), 14)  # more than two epochs
    again = dataset(**way)
    for start in (0, 6, 11):
        assert_same(batches[start : start + 3], take(again, 3, start))


@pytest.mark.parametrize(
    "way",
    [
        {},
        dict(STREAM, stream_parts=4, crop_scale=(0.5, 1.0)),
    ],
    ids=str,
)
def test_hosts_share_each_batch(way):
    batches = take(shared(**way), 7)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):  # a host's chips need not be neighbours in the batch
        host = take(dataset(rows=np.array(rows), **way), 7)
        assert_same(host, [{key: value[rows] for key, value in b.items()} for b in batches])


def test_a_host_reads_only_its_own_part_of_a_stream():
    """Two hosts, three epochs: no record is read by both, and together they read all."""
    seen = []
    for rows in np.arange(BATCH).reshape(2, -1):
        host = dataset(rows=rows, **STREAM, stream_parts=2)
        batches = take(host, 3 * 45 // BATCH)
        seen.append({image.tobytes() for batch in batches for image in batch["image"]})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {
        image.tobytes() for image in tfds_folder.load_arrays(FIXTURE, "train")["image"]
    }


@pytest.mark.parametrize("way", [{}, STREAM, dict(STREAM, stream_parts=3)], ids=str)
def test_every_epoch_holds_every_image_once_in_its_own_order(way):
    n = tfds.builder_from_directory(FIXTURE).info.splits["train"].num_examples
    batches = dataset(batch_size=n, **way)
    assert batches.num_examples == n
    source = tfds_folder.load_arrays(FIXTURE, "train")
    known = sorted(image.tobytes() for image in source["image"])
    orders = [[image.tobytes() for image in b["image"]] for b in take(batches, 3)]
    for order in orders:
        assert sorted(order) == known
    assert orders[0] != orders[1] != orders[2]
    seeded = take(dataset(batch_size=n, shuffle_seed=1, **way), 1)[0]
    assert [image.tobytes() for image in seeded["image"]] != orders[0]


@pytest.mark.parametrize("way", [{}, STREAM], ids=str)
def test_images_keep_their_captions(way):
    source = tfds_folder.load_arrays(FIXTURE, "train")
    tokenizer = Tokenizer(CONTEXT, VOCAB)
    texts = {
        image.tobytes(): {row.tobytes() for row in tokenizer(captions)}
        for image, captions in zip(source["image"], source["captions"], strict=True)
    }
    seen = {}
    for batch in take(shared(**way), 60):
        assert batch["image"].dtype == np.uint8
        assert batch["tokens"].dtype == np.int32
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
            seen.setdefault(image.tobytes(), set()).add(tokens.tobytes())
    assert set(seen) == set(texts)
    assert all(seen[key] <= texts[key] for key in texts)
    # Ten draws of eight captions: nearly every image is met with several.
    assert np.mean([len(rows) for rows in seen.values()]) > 3


def test_groups_stay_together_and_every_record_comes_about_once_an_epoch(monkeypatch):
    """The fixture's records share six styles; n is no multiple of the group's size."""
    source = tfds_folder.load_arrays(FIXTURE, "train")
    n, size = len(source["image"]), 4
    monkeypatch.setattr(pipeline, "_GROUP_SIZE", size)
    assert n % size
    style = dict(zip([i.tobytes() for i in source["image"]], source["style"], strict=True))
    full = n - n % size
    epochs = take(dataset(batch_size=full, group_by="style"), 3)
    orders = [[image.tobytes() for image in batch["image"]] for batch in epochs]
    for order in orders:
        assert len(set(order)) == full
        blocks = [[style[image] for image in order[i : i + size]] for i in range(0, full, size)]
        # Sorted by style and cut into blocks, at most one block a style spans its end.
        assert sum(len(set(block)) > 1 for block in blocks) <= len(set(style.values()))
        assert [block[0] for block in blocks] != sorted(block[0] for block in blocks)
    assert orders[0] != orders[1] != orders[2]
    assert set().union(*orders) == set(style)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(group_by="stile"), "no feature 'stile'; did you mean 'style'?"),
        (dict(group_by="tags"), "feature 'tags' holds several values a record"),
        (
            dict(group_by="style", shuffle=False),
            "is for TFDS .*--config.data.group_by=",
        ),
        (dict(group_by="style", ram_gb=0.0), "needs .* in memory: config.data.ram_gb="),
    ],
)
def test_groups_that_cannot_be_made_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        dataset(**change)


def test_the_shuffle_buffer_is_as_large_as_ram_gb(monkeypatch):
    buffers = []
    monkeypatch.setattr(pipeline.stream, "Stream", lambda *args: buffers.append(args[3]))
    split = tfds_folder.open_split(FIXTURE, "train")
    for share in (0.0, 0.5):
        ram_gb = share * split.num_bytes / 2**30
        pipeline._open(pipeline.DataConfig(path=str(FIXTURE), ram_gb=ram_gb), "train")
    assert buffers == [16, split.num_records // 2]


def test_file_order_without_shuffle():
    source = tfds_folder.load_arrays(FIXTURE, "train")["image"]
    for way in ({}, STREAM):
        first, second = take(shared(shuffle=False, **way), 2)
        np.testing.assert_array_equal(
            np.concatenate([first["image"], second["image"]]), source[:16]
        )


def test_flip_mirrors_about_half_and_nothing_else():
    plain, flipped = take(shared(), 20), take(shared(flip=True), 20)
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        for x, y in zip(a["image"], b["image"], strict=True):
            same = np.array_equal(x, y)
            mirrored += not same
            assert same or np.array_equal(x[:, ::-1], y)
    assert 40 < mirrored < 120


def test_cached_and_decoded_on_the_fly_agree():
    assert_same(take(shared(), 8), take(dataset(decoded_gb=0.0), 8))


def test_subset_keeps_what_it_says():
    names = tfds_folder.load_arrays(FIXTURE, "train", "style=noto")
    batches = dataset(subset="style=noto")
    assert batches.num_examples == len(names["image"])
    known = {image.tobytes() for image in names["image"]}
    assert {image.tobytes() for b in take(batches, 3) for image in b["image"]} == known
    assert dataset(subset="style=noto", ram_gb=0.0).num_examples == batches.num_examples


def test_damaged_records_are_replaced_and_reported(monkeypatch):
    source = tfds_folder.load_arrays(FIXTURE, "train")
    images = source["image"][:BATCH]
    theirs = Tokenizer(CONTEXT, VOCAB)(source["captions"][3]).tolist()
    real = tfds_folder.decode.decode
    records = tfds_folder.read_records(tfds_folder.open_split(FIXTURE, "train"))
    bad = records[2]["image"]

    def broken(data, *rest, **options):
        if data == bad:
            raise tfds_folder.decode.DamagedImage("cut short")
        return real(data, *rest, **options)

    monkeypatch.setattr(tfds_folder.decode, "decode", broken)
    for way in ({}, STREAM):
        batches = dataset(shuffle=False, **way)
        (batch,) = take(batches, 1)
        image = batch["image"]
        np.testing.assert_array_equal(image[2], images[3])
        assert batch["tokens"][2].tolist() in theirs  # the caption comes with the image
        np.testing.assert_array_equal(np.delete(image, 2, 0), np.delete(images, 2, 0))
        assert list(batches.damaged.values()) == ["cut short"]


@pytest.mark.parametrize("way", [{}, STREAM], ids=str)
def test_images_smaller_than_image_size_are_logged_once(way, caplog):
    take(dataset(image_size=128, **way), 2)
    (line,) = [r.getMessage() for r in caplog.records if "image_size" in r.getMessage()]
    assert "fixtures/emoji (train): images of 64 px, enlarged to image_size=128" in line
    caplog.clear()
    dataset(image_size=64, **way)
    assert not caplog.records


@pytest.mark.parametrize("way", [{}, STREAM], ids=str)
def test_a_batch_larger_than_the_split_is_logged_once(way, caplog):
    n = shared(**way).num_examples
    caplog.clear()
    take(dataset(batch_size=n + 1, **way), 2)
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"(train): batch_size={n + 1} but only {n} images: each batch repeats some" in line
    caplog.clear()
    dataset(batch_size=n, **way)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            dict(source="emojis"),
            "config.data.source must be one of 'emoji', .* not 'emojis'; did you mean 'emoji'",
        ),
        (dict(source=None), "config.data.source must be a text, not None"),
        (dict(path=5), "config.data.path must be a text, not 5"),
        (dict(flip="no"), "config.data.flip must be True or False, not 'no'"),
        (dict(group_by=None), "config.data.group_by must be a text, not None"),
        (dict(image_sise=3), "unknown key 'image_sise'; did you mean 'image_size'"),
        (dict(image_size=0), "config.data.image_size must be .* from 1 to 2147483647, not 0"),
        (dict(image_size="64"), "config.data.image_size must be a whole number, not '64'"),
        (dict(image_size=64.0), "config.data.image_size must be a whole number, not 64.0"),
        (dict(context_length=None), "config.data.context_length must be a whole number, not None"),
        (dict(context_length=2), "context_length=2: a text needs 3 ids"),
        (dict(vocab_size=True), "config.data.vocab_size must be a whole number, not True"),
        (dict(vocab_size=513), "vocab_size=513: CLIP's merges give from 514"),
        (dict(shuffle_seed=-1), "config.data.shuffle_seed must be .* from 0 to 4294967295, not -1"),
        (dict(shuffle_seed=2**64), "config.data.shuffle_seed must be .*, not 18446744073709551616"),
        (dict(image_size=2**64), "config.data.image_size must be .*, not 18446744073709551616"),
        (dict(ram_gb=math.nan), "config.data.ram_gb must be a number from 0, not nan"),
        (dict(ram_gb=-1.0), "config.data.ram_gb must be a number from 0, not -1.0"),
        (dict(ram_gb="2"), "config.data.ram_gb must be a number, not '2'"),
        (dict(decoded_gb=math.inf), "config.data.decoded_gb must be .* from 0 to 1000000, not inf"),
        (dict(decoded_gb=math.nan), "config.data.decoded_gb must be .* from 0 to 1000000, not nan"),
        (dict(decoded_gb=-0.5), "config.data.decoded_gb must be .* from 0 to 1000000, not -0.5"),
        (dict(crop_scale=(0.0, 1.0)), r"crop_scale must be two numbers \(low, .* not \(0.0, 1.0\)"),
        (dict(crop_scale=(0.9, 0.5)), "crop_scale must be two numbers .*low <= high"),
        (
            dict(crop_scale=0.5),
            r"config.data.crop_scale must be two numbers \(low, high\) .* not 0.5",
        ),
        (dict(crop_scale=(0.5,)), "crop_scale must be two numbers .*, not"),
        (dict(crop_scale=("a", "b")), "crop_scale must be two numbers .*, not"),
        (dict(crop_scale=(0.5, math.nan)), "crop_scale must be two numbers .*, not"),
        (dict(path=""), "config.data.path is empty: name a folder"),
        (dict(path=" ", source="folder"), "config.data.path is empty: name a folder"),
        (dict(path="nowhere"), "nowhere: no such folder"),
        (dict(split="tran"), "no split 'tran'"),
        (
            dict(source="folder", subset="concrete"),
            "is for TFDS .*--config.data.subset=",
        ),
        (dict(subset="style=gothic"), "empty"),
        (dict(subset="style=gothic", ram_gb=0.0), "empty"),
        (dict(subset="style", ram_gb=0.0), "'style' is text"),
        (dict(rows=np.arange(BATCH // 2), **STREAM), "set --config.data.stream_parts=2"),
        (dict(stream_parts=3, **STREAM), "is not a multiple of config.data.stream_parts=3"),
        (
            dict(stream_parts=0),
            "config.data.stream_parts must be a whole number from 1 to 65536, not 0",
        ),
    ],
)
def test_errors_are_one_line(change, match):
    with pytest.raises(UserError, match=match) as error:
        dataset(**change)
    assert "\n" not in str(error.value)
