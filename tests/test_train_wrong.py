"""Checkpoints that are not this run's, places that are none, a full disk: one line and status 2."""

import os
import re
import shutil
import subprocess
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyTask, config, dataset, losses

from dalle2_jax import build
from dalle2_jax.cli import train
from dalle2_jax.errors import UserError
from dalle2_jax.train import loop, manifest
from dalle2_jax.train.checkpoint import WorkdirLock

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    # Orbax's event loop is gone when TensorStore tells of a failed write
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir of four steps."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalle2_jax.parallel.sharding.make_mesh", one_device_mesh())
        loop.train(config(num_steps=4), ToyTask(), dataset(), workdir)
    return workdir


def one_device_mesh():
    from dalle2_jax.parallel.sharding import make_mesh

    return lambda sizes: make_mesh({}, jax.devices()[:1])


class Half(ToyTask):
    """The same network in bfloat16."""

    def init(self, key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), super().init(key))

    def loss(self, params, *rest):
        return super().loss(jax.tree.map(lambda x: x.astype(jnp.float32), params), *rest)


class Deeper(ToyTask):
    """With one parameter more."""

    def init(self, key):
        params = super().init(key)
        return {**params, "last": {"scale": jnp.ones(3)}}


class Shallower(ToyTask):
    """With one parameter less."""

    def init(self, key):
        params = super().init(key)
        return {**params, "hidden": {"kernel": params["hidden"]["kernel"]}}

    def loss(self, params, *rest):
        hidden = {**params["hidden"], "bias": jnp.zeros(self.width)}
        return super().loss({**params, "hidden": hidden}, *rest)


class Other(ToyTask):
    """The same parameters, used in another way."""

    def export(self, params):
        return {"config": {"width": self.width, "activation": "relu"}, "clip": "ab"}, params


class Renamed(ToyTask):
    def export(self, params):
        return {"config": {"width": -1}}, params


@pytest.fixture
def run(monkeypatch, capsys):
    """(workdir, task, config) -> (exit status, last line) of train.py, for a toy."""
    monkeypatch.setattr(build, "check", lambda config, task: None)
    monkeypatch.setattr(build, "dataset", lambda config, split: dataset())
    monkeypatch.setattr(train, "TENSORBOARD", types.SimpleNamespace(value=False))

    def run_it(workdir, task=None, cfg=None) -> tuple[int, str]:
        monkeypatch.setattr(build, "task", lambda config: task or ToyTask())
        capsys.readouterr()
        status = train.run(cfg or config(), str(workdir))
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    return run_it


WRONG = [
    (ToyTask(width=24), {}, r"ema_params/hidden/bias is \[\[16\], 'float32'\] there and \[\[24\]"),
    (Half(), {}, "ema_params/hidden/bias is .*'float32'. there and .*'bfloat16'. here"),
    (Deeper(), {}, r"ema_params/last/scale is absent there and \[\[3\], 'float32'\] here"),
    (Shallower(), {}, "ema_params/hidden/bias is .* there and absent here"),
    (Renamed(), {}, r"learned with another config\.width: 16 there, -1 here"),
    (ToyTask(), dict(accumulate=2), r"opt_state/.* is .* there and absent here"),
    (ToyTask(), dict(clip_norm=0.0), "opt_state/0/.* is absent there and .* here"),
]
NAMES = ["shape", "dtype", "missing", "extra", "model", "optimiser", "clipping"]


@pytest.mark.parametrize(("task", "optimizer", "told"), WRONG, ids=NAMES)
def test_another_runs_checkpoint_is_refused_by_its_key(whole, tmp_path, run, task, optimizer, told):
    workdir = shutil.copytree(whole, tmp_path / "w")
    before = (workdir / "metrics.jsonl").read_bytes()
    status, said = run(workdir, task, config(optimizer=optimizer))
    assert status == 2 and re.search(told, said), said
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["4"]


def test_places_that_hold_no_checkpoint_are_told(whole, tmp_path, run):
    for number, harm in enumerate((Path.mkdir, Path.touch)):
        workdir = shutil.copytree(whole, tmp_path / str(number))
        shutil.rmtree(workdir / "checkpoints" / "4")
        harm(workdir / "checkpoints" / "4")
        for _ in range(2):  # nor when the command is run again
            status, said = run(workdir)
            assert status == 2 and "held checkpoints but none is whole" in said
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").touch()
    status, said = run(workdir)
    assert status == 2 and f"cannot write to the folder {workdir / 'checkpoints'}" in said


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_told(whole, tmp_path, run, name):
    workdir = shutil.copytree(whole, tmp_path / "w")
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).mkdir()
    status, said = run(workdir)
    assert status == 2 and f"{workdir / name} (Is a directory): " in said


def test_a_second_writer_is_told_of_the_first(whole, tmp_path, run):
    workdir = shutil.copytree(whole, tmp_path / "w")
    with WorkdirLock(workdir):
        status, said = run(workdir)
    assert status == 2 and f"another run (process {os.getpid()}) is training in" in said
    assert run(workdir)[0] == 0


def test_a_disk_that_fills_up_is_told_within_a_step(tmp_path, monkeypatch):
    """Orbax writes in the background: its error must not wait for the next checkpoint."""
    done = threading.Event()

    def full(folder):
        if folder.name.startswith("8."):
            done.set()
            raise OSError(28, "No space left on device")
        write(folder)

    def data(start):
        for number, batch in enumerate(dataset()(start), start):
            if number == 8:
                assert done.wait(60)
            if number >= 8:  # the thread that failed has the next three steps to come to its end
                time.sleep(0.5)
            assert number < 11, "it trained on"  # to the checkpoint of step 12
            yield batch

    write = manifest.write
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(UserError, match=r"could not write a checkpoint .*No space left") as told:
        loop.train(config(num_steps=40), ToyTask(), data, tmp_path)
    assert "(step 8)" in str(told.value) and "Free some space" in str(told.value)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4"}  # no half one is left
    monkeypatch.setattr(manifest, "write", write)
    whole = loop.train(config(), ToyTask(), dataset(), tmp_path / "whole")
    again = loop.train(config(), ToyTask(), dataset(), tmp_path)
    assert losses(tmp_path) == losses(tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_on_a_full_disk_the_last_good_step_is_restorable(tmp_path, capfd):
    """A file system of two megabytes that something else fills up; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        loop.train(config(num_steps=4), ToyTask(), dataset(), disk / "w")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(free - 20_000))
        with pytest.raises(UserError, match=r"could not write a checkpoint|cannot write"):
            loop.train(config(num_steps=40), ToyTask(), dataset(), disk / "w")
        assert "Traceback" not in capfd.readouterr().err
        (disk / "ballast").unlink()
        assert loop.train(config(), ToyTask(), dataset(), disk / "w").step == 12
        loop.train(config(), ToyTask(), dataset(), tmp_path / "whole")
        assert losses(disk / "w") == losses(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
