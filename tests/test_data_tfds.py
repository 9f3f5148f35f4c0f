"""TFDS directories other than the emoji set: every kind of caption feature, and no caption."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from dalle2_jax.data import pipeline
from dalle2_jax.data.sources import tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.tokenizer import Tokenizer

CONTEXT, VOCAB = 16, 600
MEMORY, STREAM = dict(ram_gb=1.0), dict(ram_gb=0.0)
Text, Sequence, FeaturesDict = (
    tfds.features.Text,
    tfds.features.Sequence,
    tfds.features.FeaturesDict,
)


def prepare(folder, name, feature, values):
    """A TFDS directory of grey 4 x 4 images of level 0, 1, ... with these values of `name`."""
    features = FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 3)), name: feature})

    class Grey(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, value in enumerate(values):
                yield i, {"image": np.full((4, 4, 3), i, np.uint8), name: value}

    builder = Grey(data_dir=folder)
    builder.download_and_prepare(file_format="tfrecord")
    return str(builder.data_dir)


def batches(path, batch_size=2, **way):
    config = dict(source="tfds", image_size=4, context_length=CONTEXT, vocab_size=VOCAB)
    return pipeline.make_dataset(config | dict(path=path) | way, batch_size=batch_size)


@pytest.mark.parametrize(
    ("name", "feature", "values"),
    [
        ("text", Text(), ["a cat", "a dog"]),
        ("caption", tf.string, ["a cat", "a dog"]),
        ("captions", Sequence(Text()), [["a cat"], ["a dog", "my dog"]]),
        ("caption", {"id": np.int64, "text": Text()}, [dict(id=1, text="a cat")] * 2),
        (  # as the data set `coco_captions` declares them
            "captions",
            Sequence({"id": np.int64, "text": Text()}),
            [[dict(id=1, text="a cat")], [dict(id=2, text="a dog"), dict(id=3, text="my dog")]],
        ),
    ],
    ids=["text", "tensor", "texts", "dict", "dicts"],
)
def test_every_kind_of_caption_is_read_in_memory_and_streamed(tmp_path, name, feature, values):
    path = prepare(tmp_path, name, feature, values)
    expected = [
        [v["text"] if isinstance(v, dict) else v for v in (x if isinstance(x, list) else [x])]
        for x in values
    ]
    assert tfds_folder.load_arrays(path)["captions"].tolist() == expected
    rows = [{tuple(row) for row in Tokenizer(CONTEXT, VOCAB)(texts)} for texts in expected]
    for way in (MEMORY, STREAM):
        seen = [set(), set()]
        for batch in itertools.islice(batches(path, **way)(0), 12):
            for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
                seen[image[0, 0, 0]].add(tuple(tokens))
        assert seen == rows


@pytest.mark.parametrize(
    ("name", "feature", "value", "kind"),
    [
        ("caption", tfds.features.ClassLabel(num_classes=3), 1, r"ClassLabel\(.*"),
        ("captions", Sequence({"raw": Text()}), [{"raw": "a cat"}], r"Sequence\(\{ 'raw': .*"),
        ("captions", Sequence(Sequence(Text())), [["a cat"]], r"Sequence\(Sequence\(.*"),
        ("text", {"text": np.int64}, {"text": 1}, r"FeaturesDict\(.*"),
    ],
    ids=["label", "no text", "nested", "number"],
)
def test_a_caption_feature_of_another_kind_is_named(tmp_path, name, feature, value, kind):
    path = prepare(tmp_path, name, feature, [value])
    with pytest.raises(UserError, match=rf"feature {name!r} is {kind}; .*Sequence\(Text\)") as e:
        tfds_folder.open_split(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("way", [MEMORY, STREAM], ids=str)
def test_a_record_without_a_caption_is_named(tmp_path, way):
    path = prepare(tmp_path, "captions", Sequence(Text()), [["a cat"], [], ["a dog"]])
    with pytest.raises(UserError, match=r"\(train\), record 1: no caption.*prepare") as error:
        next(batches(path, batch_size=3, **way)(0))
    assert "\n" not in str(error.value)
