"""Saving and restoring, and what happens where the disk or another process does harm."""

import errno
import json
import os
import resource
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyTask, config

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import cache
from dalle2_jax.train.bucket import HeartbeatLock
from dalle2_jax.train.checkpoint import Checkpoints, WorkdirLock
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state, init_state

# Orbax's event loop is gone when TensorStore tells of a failed write
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make(devices: int = 1, fsdp: int = 1, width: int = 16, **optimizer):
    """(template, state) of the toy on a mesh of its own."""
    cfg, task = config(optimizer=optimizer), ToyTask(width=width)
    opt = make_optimizer(cfg.optimizer, cfg.num_steps)
    mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp}, jax.devices()[:devices])
    template = abstract_state(task, opt, 0, mesh, ((".*", "fsdp:0"),))
    return template, init_state(task, opt, 0, template)


def at(state, step: int):
    """`state` as it might stand at `step`."""
    params = jax.tree.map(lambda x: x + step, state.params)
    return state.replace(step=jnp.full_like(state.step, step), params=params)


def save(folder, *steps: int, keep: int = 3, scores=None, best: str = ""):
    template, state = make()
    with Checkpoints(folder, keep, best) as checkpoints:
        for step in steps:
            checkpoints.save(at(state, step), {best: scores[step]} if scores else None)
    return template, state


def restore(folder, template):
    with Checkpoints(folder, 3) as checkpoints:
        return checkpoints.restore_latest(template)


def kept(folder) -> list[int]:
    found = (folder / "checkpoints").iterdir()
    return sorted(int(p.name) for p in found if p.name.isdigit())


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_moments_in_bfloat16_stay_so(tmp_path):
    template, state = make(mu_dtype="bfloat16")
    state = state.replace(opt_state=jax.tree.map(lambda x: x + x.dtype.type(3), state.opt_state))
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(state)
    found = restore(tmp_path, template)
    assert_equal(found, state)
    dtypes = [x.dtype.name for x in jax.tree.leaves(found.opt_state)]
    assert dtypes.count("bfloat16") == len(jax.tree.leaves(state.params))
    with pytest.raises(UserError, match=r"mu.* is \[.*bfloat16.\] there and \[.*float32.\] here"):
        restore(tmp_path, make()[0])


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path, make()[0]) is None


def test_round_trip_is_exact_and_the_newest_are_kept(tmp_path):
    template, state = save(tmp_path, 1, 2, 5, 7, keep=2)
    assert kept(tmp_path) == [5, 7]
    assert_equal(restore(tmp_path, template), at(state, 7))


def test_relative_workdir_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path.relative_to(tmp_path), 3)
    assert kept(tmp_path) == [3]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    scores = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2, 5: 0.4}
    save(tmp_path, *scores, keep=1, scores=scores, best="eval/loss")
    assert kept(tmp_path) == [2, 5]


def test_the_best_is_known_to_the_next_run(tmp_path):
    scores = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.4, 5: float("nan")}
    save(tmp_path, 1, 2, keep=1, scores=scores, best="eval/loss")
    save(tmp_path, 3, 4, keep=1, scores=scores, best="eval/loss")
    assert kept(tmp_path) == [1, 4]
    save(tmp_path, 5, keep=1, scores=scores, best="eval/loss")
    assert kept(tmp_path) == [1, 5]


def test_the_best_may_be_unknown_at_some_steps(tmp_path):
    template, state = make()
    with Checkpoints(tmp_path, 1, "eval/loss") as checkpoints:
        for step, scores in ((1, {"eval/loss": 0.1}), (2, {}), (3, {"eval/loss": 0.2}), (4, {})):
            checkpoints.save(at(state, step), scores)
    assert kept(tmp_path) == [1, 4]
    assert int(restore(tmp_path, template).step) == 4


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 8), (8, 1), (4, 2)])
def test_restores_on_another_mesh(tmp_path, devices, fsdp):
    _, state = save(tmp_path, 3)
    template, _ = make(devices, fsdp)
    restored = restore(tmp_path, template)
    assert_equal(restored, at(state, 3))
    kernel = restored.params["hidden"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1)


def flip_a_bit(folder):
    """In the middle of the largest file: array data, over which Orbax keeps no checksum."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(folder):
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, empty])
def test_a_damaged_newest_falls_back_to_the_older(tmp_path, harm, caplog):
    template, state = save(tmp_path, 4, 8)
    harm(tmp_path / "checkpoints" / "8")
    assert_equal(restore(tmp_path, template), at(state, 4))
    assert "CHECKPOINT" in caplog.text
    assert kept(tmp_path) == [4]  # step 8 can be saved again
    assert [p.name.split(".")[0] for p in (tmp_path / "broken_checkpoints").iterdir()] == ["8"]
    save(tmp_path, 8)
    assert_equal(restore(tmp_path, template), at(state, 8))


def test_a_step_that_was_damaged_is_saved_when_it_is_reached_again(tmp_path):
    template, state = save(tmp_path, 4, 8, keep=2)
    truncate(tmp_path / "checkpoints" / "8")
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert int(checkpoints.restore_latest(template).step) == 4
        checkpoints.save(at(state, 8))
    assert kept(tmp_path) == [4, 8]
    assert_equal(restore(tmp_path, template), at(state, 8))


def test_what_the_weights_are_of_is_compared_and_how_they_are_computed_is_not(tmp_path):
    template, state = make()
    model = {"dim": 8, "unet": {"heads": [1, 2], "remat": False}}
    with Checkpoints(tmp_path, 1, identity={"model": model, "clip": "ab"}) as checkpoints:
        checkpoints.save(state)

    def again(**changes):
        identity = {"model": {**model, **changes}, "clip": "ab", "new": 1}
        with Checkpoints(tmp_path, 1, identity=identity) as checkpoints:
            return checkpoints.restore_latest(template)

    assert_equal(again(unet={"heads": (1, 2), "remat": True}, later=3), state)
    with pytest.raises(UserError, match=r"learned with another model\.dim: 8 there, 9 here"):
        again(dim=9)


@pytest.mark.parametrize("harm", [truncate, empty])
def test_no_checkpoint_that_loads_never_means_step_zero(tmp_path, harm):
    template, _ = save(tmp_path, 4)
    harm(tmp_path / "checkpoints" / "4")
    for _ in range(2):  # nor when the command is run again
        with pytest.raises(UserError, match="none is whole"):
            restore(tmp_path, template)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("16 GiB"), MemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError),
        (ValueError("PERMISSION_DENIED: Error opening"), ValueError),
        (PermissionError(13, "Permission denied"), UserError),
    ],
)
def test_an_error_that_is_no_damage_moves_nothing(tmp_path, monkeypatch, error, told):
    template, state = save(tmp_path, 4, 8)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_restore", fail)
        with pytest.raises(told, match=str(error.args[-1])[:8]):
            restore(tmp_path, template)
    assert kept(tmp_path) == [4, 8]
    assert_equal(restore(tmp_path, template), at(state, 8))


def delete(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def overwrite(path):
    path.write_bytes(b"\x93" * len(path.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize("harm", [delete, cut, overwrite])
@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "d/"])
def test_every_kind_of_damage_is_set_aside(tmp_path, harm, file):
    template, state = save(tmp_path, 4, 8)
    folder = tmp_path / "checkpoints" / "8"
    found = [p for p in folder.rglob("*") if p.is_file() and file in str(p.relative_to(folder))]
    for path in found:
        harm(path)
    assert found and kept(tmp_path) == [4, 8]
    assert_equal(restore(tmp_path, template), at(state, 4))
    assert kept(tmp_path) == [4]


def test_leftovers_of_a_kill_are_no_checkpoint(tmp_path):
    template, state = save(tmp_path, 4)
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert_equal(restore(tmp_path, template), at(state, 4))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_another_config_is_refused_by_name(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(UserError, match=r"another config: .*\[24\].*another --workdir"):
        restore(tmp_path, make(width=24)[0])
    assert kept(tmp_path) == [4]


def test_a_write_that_fails_is_told(tmp_path):
    """A limit on the size of files stands for a full disk."""
    _, state = make()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(tmp_path, 2)

    def write():
        checkpoints.save(state)
        checkpoints.wait()

    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match="could not write a checkpoint"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert kept(tmp_path) == []


@pytest.fixture
def no_flock(monkeypatch):
    """A function that makes `flock` fail with a code."""

    def fail(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", flock)
        monkeypatch.setattr("dalle2_jax.train.bucket.BEAT_SECONDS", 0.2)

    return fail


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_file_system_has_no_locks_a_heartbeat_is_one(
    tmp_path, no_flock, monkeypatch, caplog, code
):
    no_flock(code)
    with WorkdirLock(tmp_path):
        assert len([r for r in caplog.records if "has no file locks" in r.message]) == 1
        owner = json.loads((tmp_path / ".lock.json").read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
        monkeypatch.setattr("socket.gethostname", lambda: "another-host")
        with pytest.raises(UserError, match=rf"run \(process {os.getpid()} on .* is training"):
            WorkdirLock(tmp_path)
    assert not (tmp_path / ".lock.json").exists()
    with WorkdirLock(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held_is_another_run(tmp_path, no_flock, code):
    no_flock(code)
    with pytest.raises(UserError, match=r"another run .* is training in"):
        WorkdirLock(tmp_path)


def test_a_cache_works_without_locks(tmp_path, no_flock):
    no_flock(errno.ENOSYS)
    with cache.locked(tmp_path / "copy"):
        pass


def test_of_two_heartbeats_that_start_at_once_one_gets_the_lock(tmp_path, no_flock, monkeypatch):
    no_flock(errno.ENOSYS)
    with WorkdirLock(tmp_path), monkeypatch.context() as patch:
        # The second has looked before the first wrote.
        patch.setattr(HeartbeatLock, "_wait_for_the_dead", lambda _: None)
        patch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
        with pytest.raises(UserError, match=rf"another run \(process {os.getpid()} on "):
            WorkdirLock(tmp_path)


def test_lock_is_exclusive_and_released(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="another --workdir"):
        WorkdirLock(tmp_path)
    with WorkdirLock(tmp_path):
        pass
