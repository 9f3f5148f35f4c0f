"""Mistakes that would show after hours are told before the first step, and nothing is written."""

import numpy as np
import pytest
from toy_task import ToyTask, config, dataset

from dalle2_jax.errors import UserError
from dalle2_jax.storage import model_folder
from dalle2_jax.train import checks, loop
from dalle2_jax.train.checks import (
    check_best_metric,
    check_stands_alone,
    export_folder,
)


class Untrained(ToyTask):
    """No step is ever made with it."""

    def loss(self, params, frozen, batch, key, train):
        assert not train, "a step was made"
        return super().loss(params, frozen, batch, key, train)


@pytest.mark.parametrize(
    ("workdir", "told"),
    [
        ("", "--workdir is empty: name a folder"),
        ("s3://b/run", "--workdir=s3://b/run: name a folder of this machine or gs://BUCKET"),
        ("file", "--workdir=file is a file: name a folder"),
        ("file/run", "cannot write to the folder .*file/run"),
        ("/proc/x", "cannot write to the folder /proc/x"),
    ],
)
def test_a_workdir_that_cannot_be_is_refused(tmp_path, monkeypatch, workdir, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=told):
        loop.train(config(), Untrained(), dataset(), workdir)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"export_dtype": "float8"}, "export_dtype='float8' is unknown.*float16"),
        ({"export_to": "gs://"}, "config.export_to=gs://: name a folder of this machine or gs:"),
        ({"export_to": "/proc/x"}, "cannot write to the folder /proc/x"),
        ({"export_to": "broken"}, "config.json is not valid JSON"),
        ({"best_metric": "eval/los"}, "evaluation gives; did you mean 'eval/loss'.*eval/rms"),
    ],
)
def test_what_would_fail_at_the_end_is_told_at_the_start(tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cfg = config(eval_every=2, **change)
    with pytest.raises(UserError, match=told):
        loop.train(cfg, Untrained(), dataset(), tmp_path / "w", eval_dataset=dataset())


def test_a_best_that_is_kept_goes_through():
    cfg = config(eval_every=3, checkpoint_every=4, num_steps=12, best_metric="eval/rms")
    check_best_metric(cfg, ["eval/loss", "eval/rms"])
    check_best_metric(config(eval_every=5, num_steps=10, best_metric="a"), ["a"])  # at the end


@pytest.mark.parametrize(
    ("names", "change", "told"),
    [
        ([], {}, "needs evaluation: set config.data.eval_split and eval_every"),
        (["eval/loss"], {"eval_every": 0}, "needs evaluation"),
        (["eval/loss"], {"eval_every": 7, "checkpoint_every": 5}, "no checkpoint is saved at a st"),
    ],
)
def test_a_best_that_is_never_kept_is_refused(names, change, told):
    cfg = config(**{"best_metric": "eval/loss", "eval_every": 2, "num_steps": 20, **change})
    with pytest.raises(UserError, match=told):
        check_best_metric(cfg, names)


def test_a_clip_that_others_stand_on_is_not_replaced(tmp_path):
    check_stands_alone(tmp_path, "clip")
    for stage, entry in (("clip", {}), ("upsampler_128", {}), ("prior", {"clip": "0123"})):
        check_stands_alone(tmp_path, "clip")
        model_folder.write_stage(tmp_path, stage, entry, {"a": np.zeros(1)})
    check_stands_alone(tmp_path, "prior")
    with pytest.raises(UserError, match=r"holds prior, trained with the clip there.*export_to"):
        check_stands_alone(tmp_path, "clip")


def test_good_places_go_through(tmp_path):
    assert checks.folder(tmp_path / "new", "--workdir") == tmp_path / "new"
    assert export_folder(config(), tmp_path) == tmp_path / "model"
    assert export_folder(config(export_to=str(tmp_path / "m")), tmp_path) == tmp_path / "m"
    assert not list(tmp_path.iterdir())
