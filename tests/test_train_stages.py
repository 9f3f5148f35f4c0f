"""Every stage from images on disk to a model folder: data, task, loop, checkpoint, export."""

import pathlib
import shutil

import numpy as np
import pytest
import small_cascade
from toy_task import losses

from dalle2_jax import build
from dalle2_jax.errors import UserError
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.storage import licence, model_folder
from dalle2_jax.train import loop

pytestmark = pytest.mark.usefixtures("one_device")

FIXTURE = str(pathlib.Path(__file__).parent / "fixtures" / "emoji")


def config(stage, model, steps=4, **changes):
    data = dict(small_cascade.DATA, source="emoji", path=FIXTURE, image_size=16)
    run = dict(num_steps=steps, checkpoint_every=2, log_every=1, export_to=str(model))
    run |= dict(eval_batches=1, preview_size=2)
    return small_cascade.config(stage, str(model), data=data, **run, **changes)


def train(config, workdir):
    datasets = [build.dataset(config, split) for split in ("train", "held_out_pairs")]
    return loop.train(config, build.task(config), datasets[0], workdir, datasets[1])


def test_the_cascade_is_trained_stage_by_stage_and_goes_on_exactly(tmp_path):
    """A run that goes on from its checkpoint of step 2 comes to the losses of steps 3 and 4 and the
    very bytes of the whole run; and the cascade then generates."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for stage in small_cascade.CONFIGS:
        workdir, stopped = tmp_path / "w" / stage, tmp_path / "p" / stage
        train(config(stage, whole, eval_every=2, preview_every=4), workdir)
        shutil.copytree(workdir, stopped)  # as a run that was killed before its second checkpoint
        shutil.rmtree(stopped / "checkpoints" / "4")
        (stopped / "metrics.jsonl").write_text(
            "".join((workdir / "metrics.jsonl").read_text().splitlines(True)[:3])
        )
        train(config(stage, parts), stopped)
        assert sorted(losses(workdir)) == [1, 2, 3, 4]
        assert {step: losses(workdir)[step] for step in (3, 4)} == {
            step: losses(stopped)[step] for step in (3, 4)
        }
        assert len(list((workdir / "previews").iterdir())) == 1
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 1 + len(small_cascade.CONFIGS)
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    drawn = DALLE2.from_pretrained(str(whole)).generate("a red apple", n=2)
    assert drawn.shape == (2, 16, 16, 3) and drawn.dtype == np.uint8


def test_the_licence_of_what_a_stage_comes_from_stays_with_it(tmp_path):
    small_cascade.write(tmp_path / "clip", ["clip"])
    small_cascade.write(tmp_path / "start", ["clip", "prior"])
    licence.add("Not for harm.\n", tmp_path / "start")
    licence.add("Name the makers.\n", tmp_path / "clip")
    begun = config("prior", tmp_path / "clip", 2, init_from=str(tmp_path / "start"))
    with begun.unlocked():
        begun.export_to = str(tmp_path / "model")
    train(begun, tmp_path / "w")
    told = licence.read(tmp_path / "model")
    assert "Not for harm." in told and "Name the makers." in told


def test_a_run_that_is_refused_leaves_no_licence(tmp_path):
    small_cascade.write(tmp_path / "start", ["clip", "prior"])
    licence.add("Not for harm.\n", tmp_path / "start")
    small_cascade.write(tmp_path / "model", ["clip", "prior"])
    start = str(tmp_path / "start")
    replacing = config("clip", tmp_path / "model", 2, init_from=start)
    with pytest.raises(UserError, match="which this run would replace"):
        train(replacing, tmp_path / "w")
    misfit = config("prior", tmp_path / "model", 2, init_from=start, model__depth=3)
    with pytest.raises(UserError, match="use the config it was trained with"):
        train(misfit, tmp_path / "w")
    assert licence.read(tmp_path / "model") == ""
    (tmp_path / "file").write_text("")
    nowhere = config("clip", tmp_path / "file" / "model", 2, init_from=start)
    with pytest.raises(UserError, match="cannot write to the folder"):
        train(nowhere, tmp_path / "w")


def test_a_licence_that_cannot_be_read_is_told(tmp_path):
    small_cascade.write(tmp_path / "start", ["clip"])
    (tmp_path / "start" / licence.NAME).write_bytes(b"\xff\xfe")
    begun = config("clip", tmp_path / "model", 2, init_from=str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"cannot read .*LICENSE\.txt"):
        train(begun, tmp_path / "w")


def test_weights_are_not_taken_for_those_of_another_clip_or_model(tmp_path):
    small_cascade.write(tmp_path / "model", ["clip"])
    train(config("prior", tmp_path / "model", steps=2), tmp_path / "w")
    train(config("prior", tmp_path / "model", task__sampling__steps=2), tmp_path / "w")
    before = (tmp_path / "model" / "prior.safetensors").read_bytes()
    other = config("prior", tmp_path / "model", diffusion__prediction="v")
    with pytest.raises(UserError, match=r"another diffusion\.prediction: x_0 there, v here"):
        train(other, tmp_path / "w")
    entry = model_folder.read_stage(tmp_path / "model", "clip")
    tensors = model_folder.read_params(tmp_path / "model", "clip")
    tensors["logit_scale"] = tensors["logit_scale"] + 1
    model_folder.write_stage(tmp_path / "other", "clip", entry, tensors)
    shutil.copy(tmp_path / "other" / "clip.safetensors", tmp_path / "model")
    with pytest.raises(UserError, match="learned with another clip: "):
        train(config("prior", tmp_path / "model"), tmp_path / "w")
    assert (tmp_path / "model" / "prior.safetensors").read_bytes() == before


@pytest.mark.parametrize("stage", ["decoder", "upsampler"])
def test_weights_that_know_of_no_masks_are_fine_tuned_to_inpaint(stage, tmp_path):
    small_cascade.write(tmp_path / "start", ["clip", stage])
    small_cascade.write(tmp_path / "model", ["clip"])
    begun = dict(init_from=str(tmp_path / "start"), model__inpaints=True)
    name = build.task(config(stage, tmp_path / "model", **begun)).stage
    old = model_folder.read_params(tmp_path / "start", name)["unet"]
    train(config(stage, tmp_path / "model", 0, **begun), tmp_path / "still")
    tensors = model_folder.read_params(tmp_path / "model", name)["unet"]
    assert not tensors["conv_known"]["kernel"].any()
    np.testing.assert_array_equal(tensors["conv_in"]["kernel"], old["conv_in"]["kernel"])
    train(config(stage, tmp_path / "model", 2, **begun), tmp_path / "w")
    tensors = model_folder.read_params(tmp_path / "model", name)["unet"]
    assert tensors["conv_known"]["kernel"].any()
    deeper = config(stage, tmp_path / "model", 2, model__unet__num_blocks=2, **begun)
    with pytest.raises(UserError, match=r"holds another network: .* is missing"):
        train(deeper, tmp_path / "deeper")
