"""Karlo from its files through fine-tuning to images, at a small size and without torch."""

import pathlib
import shutil

import numpy as np
import pytest
import small_cascade
import small_karlo
from flax import traverse_util

from dalle2_jax import build
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pretrained.convert import import_model
from dalle2_jax.pretrained.export import export_model
from dalle2_jax.storage import model_folder
from dalle2_jax.train import loop

pytestmark = pytest.mark.usefixtures("one_device")

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The two pipelines of diffusers as model folders: with a prior, and with an image tower."""
    folder, found = tmp_path_factory.mktemp("karlo"), []
    for name in ("text", "images"):
        ours, theirs = folder / name, folder / f"{name} of diffusers"
        export_model(small_karlo.write(ours, variations=name == "images"), theirs)
        import_model(theirs, folder / f"{name} again")
        found.append(folder / f"{name} again")
    return found


def fine_tune(stage, entry, workdir, **settings):
    data = dict(context_length=small_karlo.CONTEXT, vocab_size=small_karlo.VOCAB, image_size=16)
    run = dict(num_steps=2, log_every=1, preview_every=2, preview_size=2, ema_warmup=False)
    run |= dict(data=dict(data, source="emoji", path=FIXTURE), ema_decay=0.7)
    run |= dict(model=entry["model"], diffusion=entry["diffusion"], export_dtype="float32")
    sampling = entry["sampling"] | {"steps": 2}
    made = small_cascade.config(stage, **run, task__sampling=sampling, **settings)
    dataset = build.dataset(made, "train")
    return loop.train(made, build.task(made), dataset, workdir, None)


def flat(folder, stage):
    return traverse_util.flatten_dict(model_folder.read_params(folder, stage), sep=".")


@pytest.mark.slow
def test_karlo_is_imported_fine_tuned_and_draws(imported, tmp_path):
    text, images = imported
    out = tmp_path / "model"
    shutil.copytree(images, out)  # its CLIP and what is not trained
    shared = dict(clip_from=str(images), export_to=str(out))
    entries = small_karlo.entries() | small_karlo.entries(variations=True)
    decay = dict(optimizer=dict(learning_rate=1e-3, weight_decay=0.1))
    first = dict(optimizer=dict(learning_rate=1e-3), task__learns=("first",))
    for stage, source, name, more in (
        ("prior", text, "prior", decay | dict(task__embedding_scale=1.0, task__candidates=1)),
        ("decoder", images, "decoder", decay | dict(task__drop_z_img=0.5)),
        ("upsampler", images, "upsampler_16", first | dict(task__separate_last_step=True)),
    ):
        told = shared | more | dict(init_from=str(source))
        fine_tune(stage, entries[name], tmp_path / stage, **told)
        before, after = flat(source, name), flat(out, name)
        assert before.keys() == after.keys()
        same = {k for k, x in before.items() if np.array_equal(x, after[k])}
        near = [np.abs(after[k] - x).max() < 0.01 for k, x in before.items()]
        assert all(near), stage  # it went on from there
        if stage == "upsampler":
            assert same == {k for k in before if k.startswith("last.")}
        else:
            assert same == ({"mean", "std"} if stage == "prior" else set())
    model = DALLE2.from_pretrained(str(out))
    drawn = model.generate(["a red apple", "a blue boat"])
    assert drawn.shape == (2, 16, 16, 3) and drawn.std() > 1
    assert model.settings()["upsampler_16"]["steps"] == 2
    assert list(model.cascade.params["upsampler_16"]) == ["first", "last"]
