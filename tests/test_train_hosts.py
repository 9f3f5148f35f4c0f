"""Two processes on loopback: the numbers of one, each its share, one checkpoint, one decision."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import fake_bucket
import jax
import numpy as np
import pytest
import toy_task
from toy_task import ToyTask, losses

from dalle2_jax import build
from dalle2_jax.data import examples
from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.storage import paths
from dalle2_jax.train import hosts, loop
from dalle2_jax.train.bucket import BucketLines
from dalle2_jax.train.checkpoint import Checkpoints, WorkdirLock
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state

SCRIPT = pathlib.Path(__file__).parent / "host_run.py"
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "emoji"
# every array split over both hosts
SPLIT = dict(mesh=dict(data=1, fsdp=8), num_steps=6, checkpoint_every=3)
PICTURES = dict(source="emoji", path=str(FIXTURE), image_size=toy_task.SIZE, context_length=8)


@pytest.fixture
def start(tmp_path):
    """(hosts, which of them, settings) -> the started processes; none outlives its test."""
    started: list[subprocess.Popen] = []

    def start_all(count: int, ranks=None, **settings) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks = range(count) if ranks is None else ranks
        for rank in ranks:
            command = [sys.executable, str(SCRIPT), str(rank), str(count), str(port)]
            errors = open(tmp_path / f"stderr_{len(started)}", "w+")  # noqa: SIM115 (closed below)
            started.append(
                subprocess.Popen(
                    [*command, json.dumps(settings)],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )
            started[-1].errors = errors
        return started[-len(ranks) :]

    yield start_all
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.errors.close()


def finish(processes, timeout: float = 120) -> list[int]:
    """Exit statuses; what each said on stderr is left in `.said`."""
    end = time.monotonic() + timeout
    for process in processes:
        process.wait(max(end - time.monotonic(), 0.1))
        process.errors.seek(0)
        process.said = process.errors.read()
    return [process.returncode for process in processes]


def wait_for(process, text: str) -> str:
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"no {text!r}; {finish([process])}: {process.said}")


def restored_on(workdir, devices: int):
    cfg = toy_task.config(**SPLIT)
    opt = make_optimizer(cfg.optimizer, cfg.num_steps)
    mesh = sharding.make_mesh(dict(data=1, fsdp=devices), jax.devices()[:devices])
    template = abstract_state(ToyTask(), opt, cfg.seed, mesh, cfg.sharding_rules)
    with Checkpoints(workdir, 3) as checkpoints:
        return sharding.flatten(jax.device_get(checkpoints.restore_latest(template)))


def assert_same(arrays, file) -> None:
    with np.load(file) as told:
        assert sorted(told.files) == sorted(arrays)
        for name, value in arrays.items():
            assert told[name].dtype == value.dtype
            np.testing.assert_array_equal(value, told[name], err_msg=name)


def test_two_hosts_are_one(start, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    processes = start(2, workdir=str(two), config=SPLIT)
    result = loop.train(toy_task.config(**SPLIT), ToyTask(), toy_task.dataset(), one)
    assert finish(processes) == [0, 0], [p.said for p in processes]

    told, alone = losses(two), losses(one)
    assert sorted(told) == sorted(alone) == list(range(1, 7))
    np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-5)

    # saved once, by both: bit-equal on 8, 4 and 1 devices of one process
    assert {p.name for p in (two / "checkpoints").iterdir()} == {"3", "6"}
    for devices in (8, 4, 1):
        assert_same(restored_on(two, devices), two / "state.npz")

    # and what one process saved on 8 devices comes to two; one SIGTERM to one of them stops both
    endless = dict(SPLIT, num_steps=10**6, checkpoint_every=10**6)
    processes = start(2, workdir=str(one), config=endless, seconds=0.02, restore=True)
    wait_for(processes[0], "step 10/")
    assert_same(sharding.flatten(jax.device_get(result.state)), one / "restored.npz")
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes, timeout=60) == [0, 0], [p.said for p in processes]
    steps = {p.stdout.read().split("stopped by SIGTERM after ")[1].strip() for p in processes}
    assert len(steps) == 1  # a common one
    newest = max(int(p.name) for p in (one / "checkpoints").iterdir())
    assert {str(newest)} == steps


def test_a_host_that_hangs_ends_all_with_their_stacks(start, tmp_path):
    settings = dict(SPLIT, num_steps=100, watchdog_seconds=8.0)
    processes = start(2, workdir=str(tmp_path), config=settings, hang_at=2, hang_rank=1)
    wait_for(processes[1], "hangs")
    assert 0 not in finish(processes, timeout=60)
    told = processes[1].said
    assert "Timeout (0:00:07.200000)!" in told and "most recent call first" in told, told
    assert "host_run.py" in told and "in own_share" in told
    # the other is told by its own watchdog or, a moment earlier, by the broken connection
    assert "loop.py" in processes[0].said, processes[0].said


@pytest.mark.slow
def test_two_hosts_share_a_workdir_in_a_bucket(start, tmp_path, monkeypatch):
    """With the real client of buckets: one lock, one set of checkpoints and metrics, and they go
    on from there as one process does on a disk."""
    gcsfs = pytest.importorskip("gcsfs")
    server = fake_bucket.serve()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # that asks the cloud itself
    gcsfs.GCSFileSystem.clear_instance_cache()
    for steps in (3, 6):
        processes = start(2, workdir="gs://bucket/run", config=dict(SPLIT, num_steps=steps))
        assert finish(processes) == [0, 0], [p.said for p in processes]
        assert not fake_bucket.names("bucket/run/.lock")
    said = processes[0].stdout.read()  # of the second time
    assert "step 4/6" in said and "step 3/6" not in said
    saved = {n.split("/")[3] for n in fake_bucket.names("bucket/run/checkpoints/")}
    assert saved == {"3", "6"}
    lines = BucketLines.read(paths.to_path("gs://bucket/run/metrics.jsonl"))
    told = {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}

    loop.train(toy_task.config(**SPLIT), ToyTask(), toy_task.dataset(), tmp_path / "one")
    alone = losses(tmp_path / "one")
    assert sorted(told) == sorted(alone) == list(range(1, 7))
    np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-5)
    server.shutdown()


@pytest.mark.slow
def test_a_host_may_compile_for_longer_than_another(start, tmp_path):
    """Between processes of a CPU collectives are lost after 30 seconds."""
    processes = start(
        2, workdir=str(tmp_path), config=dict(SPLIT, eval_every=3), slow_to_compile=40
    )
    assert finish(processes, timeout=300) == [0, 0], [p.said for p in processes]
    assert sorted(losses(tmp_path)) == list(range(1, 7))


@pytest.mark.slow
def test_the_others_end_when_a_host_is_killed_and_all_go_on(start, tmp_path):
    """kill -9 of one rank: the other must not wait for ever, and nothing of the run is lost."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    processes = start(2, workdir=str(killed), config=dict(SPLIT, num_steps=9), seconds=0.5)
    wait_for(processes[0], "step 5/")
    processes[1].kill()
    assert finish(processes[:1], timeout=200)[0] not in (0, None), processes[0].said
    assert finish(start(2, workdir=str(killed), config=dict(SPLIT, num_steps=9))) == [0, 0]
    loop.train(toy_task.config(**dict(SPLIT, num_steps=9)), ToyTask(), toy_task.dataset(), whole)
    told, alone = losses(killed), losses(whole)
    assert sorted(told) == sorted(alone) == list(range(1, 10))
    np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("clip", ("model.image.depth=1", "model.text.depth=1")),
        # what is fitted before the first step is fitted to the images of both
        ("ar_prior", ("model.depth=1", "model.dims=8", "clip_from=tiny", "task.fit_batches=8")),
    ],
)
def test_the_command_trains_on_two_hosts_as_on_one(tmp_path, stage, changes):
    """train.py itself, with images: each host reads its share of every batch, in the order of
    one host alone."""
    script = pathlib.Path(__file__).parent.parent / "train.py"
    settings = ("source=tfds", f"path={FIXTURE}", "split=train", "subset=", "eval_split=")
    command = [sys.executable, str(script), f"--config={script.parent}/configs/{stage}.py:tiny"]
    command += [f"--config.data.{setting}" for setting in settings]
    command += ["--config.batch_size=16", "--config.num_steps=4", "--config.log_every=1"]
    command += [f"--config.{change}" for change in changes]
    command += ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = [f"--coordinator_address=localhost:{free.getsockname()[1]}", "--num_processes=2"]

    def run(name: str, devices: int, *flags: str) -> subprocess.Popen:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        flags = (*flags, f"--workdir={tmp_path / name}")
        with open(tmp_path / f"{name}{flags[-2][-1]}.log", "w") as log:
            return subprocess.Popen([*command, *flags], env=env, stdout=log, stderr=log)

    two = [run("two", 4, *meet, f"--process_id={rank}") for rank in (0, 1)]
    assert [process.wait(400) for process in two] == [0, 0]
    assert run("one", 8, "--notensorboard").wait(300) == 0
    told, alone = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert sorted(told) == sorted(alone) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-5)


def test_two_hosts_go_back_together(start, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    cfg, bad = dict(SPLIT, max_skips=3, num_steps=9), [2, 5, 6, 7]
    processes = start(2, workdir=str(two), config=cfg, poison_at=bad)
    result = loop.train(toy_task.config(**cfg), ToyTask(), toy_task.dataset(poison_at=bad), one)
    assert finish(processes) == [0, 0], [p.said for p in processes]
    assert int(result.state.faults.passed_over) == 8
    told, alone = losses(two), losses(one)
    assert sorted(told) == sorted(alone)
    np.testing.assert_allclose(list(told.values()), list(alone.values()), rtol=1e-5)
    with np.load(two / "state.npz") as state:
        assert state["faults/passed_over"] == 8 and state["step"] == 9


def test_a_second_sigterm_ends_a_host_that_hangs_at_once(start, tmp_path):
    processes = start(2, workdir=str(tmp_path), config=SPLIT, hang_at=3, hang_rank=1)
    wait_for(processes[1], "hangs")
    for _ in range(2):  # one waits in a collective, one in Python, for the end of their step
        assert [process.poll() for process in processes] == [None, None]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        time.sleep(1)
    assert finish(processes, timeout=60) == [-signal.SIGTERM] * 2


def test_each_host_reads_its_own_images(monkeypatch):
    """Of every batch of 16 each of two hosts reads 8: together those that one host reads."""
    get, places = examples.ImageCache.get, {}

    def spy(self, place, *crop):  # of each reader: one that was closed may still end its batch
        places.setdefault(self, []).append(int(place))
        return get(self, place, *crop)

    monkeypatch.setattr(examples.ImageCache, "get", spy)
    cfg, read = toy_task.config(data=PICTURES), {}
    for host, count in ((0, 1), (0, 2), (1, 2)):
        rows = np.arange(16).reshape(count, -1)[host]
        monkeypatch.setattr(sharding, "local_rows", lambda mesh, size, rows=rows: rows)
        batches = build.dataset(cfg, "train")(0)
        assert {next(batches)["image"].shape[0] for _ in range(4)} == {16 // count}
        batches.close()
        newest = list(places.values())[-1]
        read[host, count] = newest[: 4 * 16 // count]  # what was made ahead comes after it
    for step in range(4):
        shares = [read[host, 2][8 * step : 8 * step + 8] for host in (0, 1)]
        assert len({*shares[0]}) == len({*shares[1]}) == 8
        assert sorted(shares[0] + shares[1]) == sorted(read[0, 1][16 * step : 16 * step + 16])


def test_all_hosts_hear_of_what_only_the_first_can_see(start, tmp_path):
    with WorkdirLock(tmp_path):
        processes = start(2, workdir=str(tmp_path), config=SPLIT)
        assert finish(processes, timeout=60) == [2, 2]
    for process in processes:
        told = [line for line in process.said.splitlines() if line.startswith("host_run.py: ")]
        assert len(told) == 1 and f"another run (process {os.getpid()})" in told[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("h:1", None, 0), r"--num_processes missing: give --coordinator_address, --num"),
        ((None, 2, None), "--coordinator_address and --process_id missing"),
        (("h", 2, 0), "--coordinator_address=h must be HOST:PORT"),
        (("h:99999", 2, 0), "--coordinator_address=h:99999 must be HOST:PORT"),
        (("no.invalid:1", 2, 0), "--coordinator_address=no.invalid:1 must be HOST:PORT .*: no.inv"),
        (("h:1", 0, 0), "--num_processes=0 must be 1 or more"),
        (("h:1", 2, 2), "--process_id=2 must be from 0 to 1"),
    ],
)
def test_a_part_of_the_flags_or_a_wrong_one_is_told(given, told):
    with pytest.raises(UserError, match=told):
        hosts.connect(False, *given)


def test_hosts_that_never_meet_say_so_and_hear_signals_meanwhile(start, tmp_path):
    (alone,) = start(2, ranks=[1], workdir=str(tmp_path), wait=3.0)
    assert finish([alone]) == [os.EX_TEMPFAIL]
    told = [line for line in alone.said.splitlines() if line.startswith("host_run.py: ")]
    assert len(told) == 1 and "not all hosts met at localhost:" in told[0], alone.said

    (patient,) = start(2, ranks=[0], workdir=str(tmp_path), wait=600.0)
    wait_for(patient, "joins")
    time.sleep(1)
    patient.send_signal(signal.SIGINT)
    assert finish([patient], timeout=60) == [130], patient.said


def test_hosts_are_joined_by_flags_by_the_slice_or_not_at_all(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.delenv("MEGASCALE_COORDINATOR_ADDRESS", raising=False)
    hosts.connect()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    hosts.connect()
    assert calls == []
    hosts.connect(False, "10.0.0.1:1234", 2, 0)
    hosts.connect(True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1v-0,t1v-1")
    hosts.connect()
    assert calls == [("10.0.0.1:1234", 2, 0), (None, None, None), (None, None, None)]


def test_where_there_is_no_slice_it_is_told(monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"\(coordinator_address should be defined\.\).*give --co"):
        hosts.connect(True)


def test_what_else_fails_while_joining_is_not_lost_with_its_thread(monkeypatch):
    """Else a host would go on alone."""

    def fail(*_, **__):
        raise OSError("no sockets left")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(OSError, match="no sockets left"):
        hosts.connect(True)
