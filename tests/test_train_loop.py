"""The loop as a whole: resume, devices, accumulation, NaN, signals, warm start, the lock."""

import faulthandler
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy_task
from toy_task import ToyTask, config, dataset, losses

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import model_folder, model_names
from dalle2_jax.tokenizer import Tokenizer
from dalle2_jax.train import loop, outputs
from dalle2_jax.train.checkpoint import Checkpoints, WorkdirLock
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.recovery import Recovery
from dalle2_jax.train.state import abstract_state, init_state
from dalle2_jax.train.step import global_batch, make_train_step, place_frozen


def run_on(
    devices: int, steps: int = 8, data=None, noise=0.01, **changes
) -> tuple[list[float], dict]:
    """Losses and final parameters of the bare step on the first `devices` devices."""
    cfg = config(num_steps=steps, **changes)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, **{k: v for k, v in cfg.mesh.items() if v > 0}}
    sizes["data"] = devices // (sizes["fsdp"] * sizes["tensor"])
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    task, opt = ToyTask(noise=noise), make_optimizer(cfg.optimizer, steps)
    template = abstract_state(task, opt, 0, mesh, cfg.sharding_rules)
    state = init_state(task, opt, 0, template)
    step = make_train_step(task, opt, cfg, template, mesh)
    frozen, batches, found = place_frozen(task.frozen(), mesh), (data or dataset())(0), []
    for _ in range(steps):
        state, metrics = step(state, frozen, global_batch(next(batches), mesh))
        found.append(float(metrics["loss"]))
    return found, jax.device_get(state.params)


def test_training_learns(tmp_path, one_device):
    result = loop.train(config(num_steps=60, checkpoint_every=0), ToyTask(), dataset(), tmp_path)
    found = losses(tmp_path)
    assert result.step == 60 and result.stopped_by is None
    assert found[60] < 0.1 * found[1]


def test_resume_is_bit_equal(tmp_path):
    whole = loop.train(config(), ToyTask(), dataset(), tmp_path / "whole")
    loop.train(config(num_steps=7), ToyTask(), dataset(), tmp_path / "parts")
    parts = loop.train(config(), ToyTask(), dataset(), tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 13))
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_that_vanished_are_missed(tmp_path, one_device):
    """What metrics.jsonl tells of would be lost; a run killed before its first starts over."""
    cfg = config(num_steps=3)  # one checkpoint, at its end
    loop.train(cfg, ToyTask(), dataset(), tmp_path)
    told = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    for every in (4, 100, 0):
        cfg.checkpoint_every = every
        with pytest.raises(UserError, match=r"holds no checkpoint, though .* one of step 3: put"):
            loop.train(cfg, ToyTask(), dataset(), tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == told
    early = [line for line in told.splitlines(True) if "checkpoint" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(early) + "no json\n")
    assert loop.train(cfg, ToyTask(), dataset(), tmp_path).step == 3
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_metrics_tell_of_a_checkpoint_once_it_is_there(tmp_path):
    loop.train(config(num_steps=9), ToyTask(), dataset(), tmp_path)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [x["checkpoint"] for x in lines if "checkpoint" in x] == [4, 8, 9]


def test_kill_9_resumes_bit_equal_and_sigterm_saves(tmp_path):
    script = [sys.executable, toy_task.__file__, str(tmp_path / "killed"), "30"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}

    def start_and_wait_for(step: int, *slow_from: str):
        process = subprocess.Popen(
            [*script, *slow_from],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for line in process.stdout:
            if line.startswith(f"step {step}/"):
                return process
        raise AssertionError("the run ended early")

    process = start_and_wait_for(8)
    time.sleep(0.1)  # the save of step 5 is asynchronous
    process.kill()
    process.wait()
    process = start_and_wait_for(14, "15")  # a second each, so that the signal is in time
    process.send_signal(signal.SIGTERM)
    told = process.stdout.read()
    assert process.wait() == 0 and "stopped by SIGTERM" in told
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
    assert "after 30" in done.stdout
    subprocess.run([*script[:2], str(tmp_path / "whole"), "30"], env=env, check=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 30


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ({}, ((".*", "fsdp"),)),
        ({"fsdp": 8}, ((".*", "fsdp"),)),
        ({"fsdp": 2, "tensor": 2}, (("hidden/kernel", "tensor:1+fsdp"), (".*", "fsdp"))),
    ],
)
def test_eight_devices_agree_with_one(mesh, rules):
    one, params_one = run_on(1)
    eight, params_eight = run_on(8, mesh=mesh, sharding_rules=rules)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params_one), jax.tree.leaves(params_eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_accumulation_equals_a_larger_batch():
    large = dataset(32)

    def halves(start: int):
        assert start == 0
        for batch in large(0):
            yield {"image": batch["image"][:16]}
            yield {"image": batch["image"][16:]}

    _, whole = run_on(1, steps=4, data=large, noise=0.0, batch_size=32)
    _, parts = run_on(1, steps=8, data=halves, noise=0.0, optimizer=dict(accumulate=2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("error", [UserError("a.png is gone"), OSError(28, "No space left")])
def test_what_fails_on_the_way_costs_no_step(tmp_path, one_device, error):
    def failing(start):
        yield from itertools.islice(dataset()(start), 6)
        raise error

    with pytest.raises(UserError, match=r"(gone|left).*\(step 6 is saved: .* the same command"):
        loop.train(config(), ToyTask(), failing, tmp_path / "w")
    assert loop.train(config(), ToyTask(), dataset(), tmp_path / "w").step == 12
    loop.train(config(), ToyTask(), dataset(), tmp_path / "whole")
    assert losses(tmp_path / "w") == losses(tmp_path / "whole")


def test_what_fails_after_an_evaluation_keeps_its_scores(tmp_path, one_device, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left")

    cfg = config(eval_every=2, preview_every=2, checkpoint_every=4, best_metric="eval/loss")
    monkeypatch.setattr(outputs.grids, "labelled_grid", full)
    with pytest.raises(UserError, match="step 2 is saved"):
        loop.train(cfg, ToyTask(), dataset(), tmp_path, eval_dataset=dataset(8))
    scores = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"  # where Orbax keeps them
    assert json.loads(scores.read_text())["eval/loss"] > 0


def test_what_cannot_be_saved_is_not_called_saved(tmp_path, one_device, monkeypatch):
    def full(self, *_):
        raise UserError("disk full")

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(UserError, match=r"^disk full$"):
        loop.train(config(), ToyTask(), dataset(), tmp_path)


def test_what_fails_at_once_saves_nothing(tmp_path, one_device):
    def failing(start):
        raise UserError("a.png is gone")
        yield

    with pytest.raises(UserError, match=r"^a\.png is gone$"):
        loop.train(config(), ToyTask(), failing, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


class OtherCLIP(ToyTask):
    stage = "clip"


def test_a_clip_that_others_stand_on_is_kept(tmp_path, one_device):
    cfg = config(num_steps=1, export_to=str(tmp_path / "m"))
    loop.train(cfg, OtherCLIP(), dataset(), tmp_path / "w")
    on = model_folder.stage_hash(tmp_path / "m", "clip")
    model_folder.write_stage(tmp_path / "m", "prior", {"clip": on}, {"a": np.zeros(1)})
    before = model_folder.weights_hash(tmp_path / "m")
    loop.train(cfg, OtherCLIP(), dataset(), tmp_path / "w")  # its own run, at its end
    for workdir, steps in (("w", 2), ("other", 1)):
        again = config(num_steps=steps, export_to=str(tmp_path / "m"))
        with pytest.raises(UserError, match="m holds prior, trained with the clip there"):
            loop.train(again, OtherCLIP(), dataset(), tmp_path / workdir)
    finished = config(num_steps=1, export_to=str(tmp_path / "m"), export_dtype="float16")
    with pytest.raises(UserError, match="m holds prior, trained with another clip than this"):
        loop.train(finished, OtherCLIP(), dataset(), tmp_path / "w")
    assert model_folder.weights_hash(tmp_path / "m") == before


def test_warm_start_from_an_exported_folder(tmp_path, one_device):
    loop.train(config(), ToyTask(), dataset(), tmp_path / "first")
    folder = tmp_path / "first" / "model"
    cfg = config(init_from=str(folder), num_steps=1, optimizer=dict(learning_rate=0.0))
    second = loop.train(cfg, ToyTask(), dataset(), tmp_path / "second")
    told = sharding.flatten(model_folder.read_params(folder, "toy"))
    for name, value in sharding.flatten(second.state.params).items():
        np.testing.assert_array_equal(value, told[name])
    with pytest.raises(UserError, match=r"hidden\.bias is \(16,\), not \(24,\).*: use"):
        loop.train(cfg, ToyTask(width=24), dataset(), tmp_path / "third")


def test_warm_start_refuses_what_it_would_load_in_part(tmp_path, one_device):
    params = jax.device_get(ToyTask().init(jax.random.key(0)))
    model_folder.write_stage(tmp_path, "toy", {}, {**params, "last": {"bias": np.zeros(3)}})
    with pytest.raises(
        UserError, match=r"last\.bias is unknown: use the config it was trained with"
    ):
        loop.train(config(init_from=str(tmp_path)), ToyTask(), dataset(), tmp_path / "w")


def test_warm_start_knows_models_by_name(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(model_names, "PACKAGED", tmp_path)
    params = jax.device_get(ToyTask().init(jax.random.key(5)))
    model_folder.write_stage(tmp_path / "small", "toy", {}, params)
    cfg = config(init_from="small", num_steps=1, optimizer=dict(learning_rate=0.0))
    result = loop.train(cfg, ToyTask(), dataset(), tmp_path / "w")
    np.testing.assert_array_equal(result.state.params["out"]["kernel"], params["out"]["kernel"])


def test_warm_start_yields_to_a_checkpoint(tmp_path, one_device):
    loop.train(config(num_steps=4), ToyTask(), dataset(), tmp_path)
    cfg = config(num_steps=5, init_from=str(tmp_path / "nowhere"))
    assert loop.train(cfg, ToyTask(), dataset(), tmp_path).step == 5


def test_max_minutes_saves_exports_and_goes_on(tmp_path, one_device):
    cfg = config(max_minutes=1e-6, num_steps=3, checkpoint_every=0)
    for step, reason in ((1, "max_minutes"), (2, "max_minutes"), (3, "max_minutes"), (3, None)):
        result = loop.train(cfg, ToyTask(), dataset(), tmp_path)
        assert (result.step, result.stopped_by) == (step, reason)
        assert result.exit_status == (75 if reason else 0)
        assert (tmp_path / "model" / "toy.safetensors").exists()


def test_evaluation_previews_and_export_come_when_due(tmp_path, one_device, monkeypatch):
    exported, write = [], model_folder.write_stage

    def spy(folder, stage, entry, params, dtype):
        exported.append(params)
        write(folder, stage, entry, params, dtype)

    monkeypatch.setattr(model_folder, "write_stage", spy)
    cfg = config(num_steps=5, eval_every=2, preview_every=4, export_every=2, eval_batches=2)
    result = loop.train(cfg, ToyTask(), dataset(), tmp_path, eval_dataset=dataset(8))
    kernels = [params["out"]["kernel"] for params in exported]
    assert len(kernels) == 3  # steps 2, 4 and the end, each of them other weights
    assert all((a != b).any() for a, b in itertools.pairwise(kernels))
    np.testing.assert_array_equal(kernels[-1], result.state.ema_params["out"]["kernel"])
    read = model_folder.read_params(tmp_path / "model", "toy")
    np.testing.assert_array_equal(read["out"]["kernel"], kernels[-1])
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "eval/loss" in x] == [2, 4]
    assert [p.name for p in (tmp_path / "previews").iterdir()] == ["step_000004_first.png"]


def test_the_watchdog_knows_steps_from_other_work(tmp_path, one_device, monkeypatch):
    """A step has watchdog_seconds; what restores, evaluates, saves or exports has an hour."""
    armed, seen = [], []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, **_: armed.append(s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: armed.append(None))

    def spy(owner, name):
        work = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.append((name, armed[-1]))
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    spy(Recovery, "start")
    spy(Checkpoints, "save")
    spy(outputs.Outputs, "evaluate")
    spy(outputs.Outputs, "export")
    spy(loop, "global_batch")
    changes = dict(num_steps=4, checkpoint_every=2, eval_every=2, watchdog_seconds=60.0)
    loop.train(config(**changes), ToyTask(), dataset(), tmp_path, dataset())
    step, other = ("global_batch", 60.0), 3600.0
    work = [("evaluate", other), ("save", other)]
    first = [("start", other), ("global_batch", other)]  # which compiles
    assert seen == [*first, step, *work, step, step, *work, ("export", other)]
    assert armed[-1] is None


def test_without_held_out_data_nothing_is_evaluated(tmp_path, one_device):
    cfg = config(num_steps=2, eval_every=1, preview_every=2, checkpoint_every=0)
    loop.train(cfg, ToyTask(), dataset(), tmp_path)
    assert "eval/" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "previews" / "step_000002_first.png").exists()


def test_previews_stand_under_their_captions(tmp_path, one_device, monkeypatch):
    captions, given = ["A red apple", "two dogs", "", "a cat"] * 4, []
    grid = outputs.grids.labelled_grid

    def captioned(start):
        for batch in dataset()(start):
            yield {**batch, "tokens": Tokenizer(16, 600)(captions)}

    def spy(images, columns, **options):
        given.append((images, columns, options["row_labels"]))
        return grid(images, columns, **options)

    monkeypatch.setattr(outputs.grids, "labelled_grid", spy)
    cfg = config(num_steps=1, preview_every=1, preview_size=3, data=dict(vocab_size=600))
    loop.train(cfg, ToyTask(), captioned, tmp_path)
    ((images, columns, labels),) = given
    np.testing.assert_array_equal(images, next(dataset()(0))["image"][:3])
    assert columns == 1 and labels == ["a red apple", "two dogs", ""]


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path, one_device):
    with WorkdirLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        loop.train(config(), ToyTask(), dataset(), tmp_path)
    WorkdirLock(tmp_path).__exit__()


def test_batch_must_split_over_the_mesh(tmp_path):
    with pytest.raises(UserError, match="batch_size=12 is not a multiple of 8"):
        loop.train(config(batch_size=12), ToyTask(), dataset(12), tmp_path)
