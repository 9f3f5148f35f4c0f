import jax
import numpy as np
import pytest
import small_judge
from PIL import Image

from dalle2_jax.data.emoji import words
from dalle2_jax.errors import UserError
from dalle2_jax.evals.judge import TEMPLATES, Judge
from dalle2_jax.imaging import arrays
from dalle2_jax.storage import model_folder
from dalle2_jax.tokenizer import Tokenizer

PAIRS = [("red apple", "noto"), ("fox", "twemoji"), ("owl", "noto")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge.load(small_judge.write(tmp_path_factory.mktemp("judge")), batch_size=4)


def random_images(n, side=16):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)


def test_embeddings_are_the_networks_own(judge):
    text = small_judge.MODEL["text"]
    tokens = Tokenizer(text["context_length"], text["vocab_size"])(["a fox", "an owl"])
    images, params = arrays.to_float(random_images(2)), {"params": judge.params}
    z_img, z_txt, _ = jax.jit(judge.network.apply)(params, images, tokens)
    np.testing.assert_allclose(judge.embed_images(random_images(2)), z_img, atol=1e-5)
    np.testing.assert_allclose(judge.embed_captions(["a fox", "an owl"]), z_txt, atol=1e-5)


def test_batches_do_not_change_a_row(judge):
    many = judge.embed_images(random_images(9))
    assert many.shape == (9, 24)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1.0, atol=1e-5)
    for i in (0, 3, 4, 8):
        # To rounding: products of matrices compute the last rows of a batch in another way.
        alone = judge.embed_images(random_images(9)[i : i + 1])
        np.testing.assert_allclose(alone, many[i : i + 1], atol=1e-5)


def test_large_images_are_read_at_the_judges_size(judge):
    large = random_images(2).repeat(3, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(
        judge.embed_images(large), judge.embed_images(random_images(2)), atol=1e-4
    )


def test_images_are_preprocessed_as_in_the_judges_training(tmp_path):
    """By Pillow's bicubic filter, the middle alone; and any z is scaled to unit length."""
    image = small_judge.MODEL["image"] | {"resize": "bicubic"}
    model = small_judge.MODEL | {"image": image, "unit_length": False}
    judge = Judge.load(small_judge.write(tmp_path, model=model), batch_size=4)
    wide = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)
    small = [Image.fromarray(x).resize((22, 16), Image.Resampling.BICUBIC) for x in wide]
    inputs = np.stack([np.asarray(x)[:, 3:19] for x in small]) / 127.5 - 1
    z = judge.network.apply({"params": judge.params}, inputs, method="encode_image")
    length = np.linalg.norm(z, axis=1, keepdims=True)
    assert np.abs(length - 1).min() > 0.1
    np.testing.assert_allclose(judge.embed_images(wide), z / length, atol=1e-5)
    z_txt = judge.embed_captions(["a fox", "an owl"])
    np.testing.assert_allclose(np.linalg.norm(z_txt, axis=1), 1.0, atol=1e-5)


def test_a_pair_is_the_mean_of_its_captions(judge):
    got = judge.embed_pairs(PAIRS)
    captions = [words.caption("fox", "twemoji", i) for i in TEMPLATES]
    assert len(set(captions)) == len(TEMPLATES) == 10
    mean = judge.embed_captions(captions).mean(axis=0)
    np.testing.assert_allclose(got[1], mean / np.linalg.norm(mean), atol=1e-5)


def test_a_judge_recognises_its_own_weights(judge):
    assert judge.is_clip(jax.device_put(judge.params))
    assert not judge.is_clip(jax.tree.map(lambda p: p + 1, judge.params))
    assert not judge.is_clip({"image_tower": judge.params["image_tower"]})


def test_mistakes_raise_with_a_cure(tmp_path):
    with pytest.raises(UserError, match=r"configs/clip\.py:judge"):
        Judge.load(str(tmp_path / "nowhere"))
    model_folder.write_stage(tmp_path, "prior", {}, {"a": np.zeros(1)})
    with pytest.raises(UserError, match="no stage 'clip'; it has: prior"):
        Judge.load(str(tmp_path))
