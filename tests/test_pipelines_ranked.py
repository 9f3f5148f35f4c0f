"""Reranking: the best of many, by CLIP."""

import dataclasses

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.cascade import Cascade
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.embeddings import normalise

PROMPTS = ["a cat", "dog, flat"]


@pytest.fixture(scope="module")
def model(folder) -> DALLE2:
    return DALLE2.from_pretrained(folder)


def test_the_best_images_are_those_nearest_to_the_prompt_the_nearest_first(model):
    # The scores of this seed are 0.01 and more apart: rounded pixels do not change their order.
    every = model.generate(PROMPTS, n=6, seed=4).reshape(2, 6, 16, 16, 3)
    z_txt = normalise(model.encode_text(PROMPTS))
    rows = list(model.rank(PROMPTS, 2, 6, seed=4, batch_size=5))
    assert [len(row) for row in rows] == [2, 2]
    for prompt, row in enumerate(rows):
        scores = normalise(model.encode_image(every[prompt])) @ z_txt[prompt]
        best = np.argsort(-scores)[:2]
        assert [one.index for one in row] == best.tolist()
        np.testing.assert_allclose([one.score for one in row], scores[best], atol=2e-3)
        for one in row:
            gap = np.abs(one.image.astype(int) - every[prompt, one.index])
            assert gap.max() <= 2  # image i of a seed is the same in any batch
    again = model.generate(PROMPTS, n=2, seed=4, best_of=6, batch_size=5)
    np.testing.assert_array_equal(again, np.stack([o.image for row in rows for o in row]))


def test_if_as_many_are_generated_as_kept_none_is_lost(model):
    best = model.generate(PROMPTS[0], n=3, seed=3, best_of=3)
    every = model.generate(PROMPTS[0], n=3, seed=3)
    assert sorted(p.tobytes() for p in best) == sorted(p.tobytes() for p in every)


def test_clip_reads_one_batch_at_a_time(model, monkeypatch):
    seen = []

    def encode_image(self, images):
        seen.append(len(images))
        return np.tile(np.eye(1, 16), (len(images), 1))  # all have one z_img

    monkeypatch.setattr(Cascade, "encode_image", encode_image)
    rows = list(model.rank(PROMPTS, 2, 12, seed=3, batch_size=8))
    assert seen == [8, 8, 8]
    assert [[one.index for one in row] for row in rows] == [[0, 1]] * 2  # of equal ones the first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3, "best_of": 2}, "best_of must be a whole number from 3, not 2"),
        ({"best_of": 1.5}, "best_of must be a whole number from 1"),
        ({"prompts": None, "best_of": 2}, "a prompt is empty"),
        ({"prompts": [""], "best_of": 2}, "a prompt is empty"),
        ({"prompts": 3, "best_of": 2}, "prompts must be a text or a list of texts"),
    ],
)
def test_mistakes_are_one_line(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(**{"prompts": PROMPTS, **options})


def test_a_model_without_image_tower_cannot_rank(model):
    clip = dataclasses.replace(model.cascade.clip, image=None)
    text_only = DALLE2(dataclasses.replace(model.cascade, clip=clip))
    with pytest.raises(UserError, match="has no image tower: it cannot rank"):
        text_only.generate(PROMPTS, best_of=2)
