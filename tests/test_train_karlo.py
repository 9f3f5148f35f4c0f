"""Karlo from its files through fine-tuning to pictures, at a small size and without torch."""

import pathlib
import shutil

import karlo_layout
import numpy as np
import pytest
import small_cascade
from flax import traverse_util
from small_cascade import KARLO
from toy_task import losses

from dalle2_jax import build, model_folder
from dalle2_jax.dalle2 import DALLE2
from dalle2_jax.pretrained.convert import import_model
from dalle2_jax.train import loop

pytestmark = pytest.mark.usefixtures("compile_once", "one_device")

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The two pipelines as model folders: with a prior, and with an image tower."""
    folder, found = tmp_path_factory.mktemp("karlo"), {}
    for kind in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        found[kind] = folder / f"{kind}-ours"
        import_model(karlo_layout.write(folder / kind, kind), found[kind])
    return found.values()


def fine_tune(stage, workdir, **settings):
    data = dict(small_cascade.DATA, source="emoji", path=FIXTURE, image_size=16)
    run = dict(data=data, num_steps=2, log_every=1, preview_every=2, preview_size=2)
    made = small_cascade.config(stage, **(KARLO[stage] | run | settings))
    dataset = build.dataset(made, "train")
    return loop.train(made, build.task(made), dataset, workdir, None)


def flat(folder, stage):
    return traverse_util.flatten_dict(model_folder.read_params(folder, stage), sep=".")


def test_karlo_is_imported_fine_tuned_and_draws(imported, tmp_path):
    text, pictures = imported
    out = tmp_path / "model"
    shutil.copytree(pictures, out)  # its CLIP and what is not trained
    shared = dict(clip_from=str(pictures), export_to=str(out), ema_warmup=False, ema_decay=0.7)
    shared |= dict(optimizer__learning_rate=1e-3)
    decay = dict(optimizer__weight_decay=0.1)
    only_first = dict(task__learns=("first",))
    for stage, source, name, more in (
        ("prior", text, "prior", decay),
        ("decoder", pictures, "decoder", decay),
        ("upsampler", pictures, "upsampler_16", only_first),
    ):
        fine_tune(stage, tmp_path / stage, init_from=str(source), **shared, **more)
        assert np.isfinite(losses(tmp_path / stage)).all()
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
    assert list(model.params["upsampler_16"]) == ["first", "last"]
