"""Model folders and checkpoints of an older version load, generate the same and resume.

`fixtures/old_files` was written by commit a37d8d5, before the package had its present layout:
`model` by its `small_cascade.write`, `runs.zip` by two steps of training of two stages, and
`expected.json` holds what that commit went on to compute from both.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_cascade
from toy_task import losses

from dalle2_jax import DALLE2, build
from dalle2_jax.train import loop

FIXTURES = Path(__file__).parent / "fixtures"
OLD = FIXTURES / "old_files"
MODEL = str(OLD / "model")
EXPECTED = json.loads((OLD / "expected.json").read_text())
REORDERED = 1e-4  # float32 sums of at most 1e4 terms in another order


def test_an_old_model_folder_generates_the_same_images():
    images = DALLE2.from_pretrained(MODEL).generate("a red apple", n=2, seed=3)
    expected = np.asarray(EXPECTED["images"])
    assert np.ptp(expected) == 255  # the weights are random and the images far from constant
    # A value next to a rounding boundary may fall on the other side of it.
    np.testing.assert_allclose(images.astype(int), expected, rtol=0, atol=1)


@pytest.mark.parametrize(("prior", "key"), [("diffusion", "z_img"), ("ar", "z_img_ar")])
def test_its_priors_sample_the_same_embeddings(prior, key):
    model = DALLE2.from_pretrained(MODEL).with_prior(prior)
    z_img = model.sample_prior("a red apple", n=2, seed=3)
    np.testing.assert_allclose(z_img, EXPECTED[key], rtol=REORDERED, atol=REORDERED)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("stage", ["prior", "ar_prior"])
def test_an_old_run_resumes(stage, tmp_path):
    """The parameters, Adam's moments, the average, the data's position and the random numbers."""
    shutil.unpack_archive(OLD / "runs.zip", tmp_path)
    workdir = tmp_path / stage
    config = small_cascade.config(
        stage,
        MODEL,
        num_steps=4,
        checkpoint_every=2,
        log_every=1,
        eval_batches=1,
        preview_size=2,
        data=dict(small_cascade.DATA, source="emoji", path=str(FIXTURES / "emoji"), image_size=16),
    )
    loop.train(config, build.task(config), build.dataset(config, "train"), workdir)
    expected = {int(step): loss for step, loss in EXPECTED["losses"][stage].items()}
    assert losses(workdir) == pytest.approx(expected, rel=REORDERED)
