"""kill -9 and SIGTERM at any moment: the next run's numbers are those of one that was let be."""

import json
import multiprocessing
import os
import random
import signal
import time

import kill_run
import pytest
from toy_task import losses

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kill_run"])  # imported once: each run starts in a second


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("jax")


@pytest.fixture
def start(cache):
    started = []

    def start_one(workdir, num_steps, **settings):
        settings["cache"], settings["result"] = cache, CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=kill_run.run, args=(workdir, num_steps), kwargs=settings)
        process.start()
        started.append(process)
        return process, settings["result"]

    yield start_one
    for process in started:
        process.kill()
        process.join()


def finish(process, result) -> tuple:
    process.join(120)
    assert process.exitcode == 0
    return result.get()


def steps_of(workdir) -> int:
    try:
        return len((workdir / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def wait_for_step(process, workdir, step: int) -> None:
    while steps_of(workdir) < step:
        assert process.is_alive()
        time.sleep(0.01)


def assert_same(killed, whole, num_steps: int) -> None:
    told = losses(whole)
    assert losses(killed) == told and sorted(told) == list(range(1, num_steps + 1))
    lines = [json.loads(x) for x in (killed / "metrics.jsonl").read_text().splitlines()]
    # each once, in order
    assert [x["step"] for x in lines if "checkpoint" not in x] == sorted(told)
    saved = [x["checkpoint"] for x in lines if "checkpoint" in x]
    assert saved == sorted(set(saved)) and saved[-1] == num_steps


def assert_nothing_left(workdir, num_steps: int) -> None:
    assert {p.name for p in workdir.iterdir()} == {".lock", "checkpoints", "metrics.jsonl", "model"}
    kept = {str(num_steps), str(num_steps - 5)}
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == kept
    assert {p.name for p in (workdir / "model").iterdir()} == {"config.json", "toy.safetensors"}
    assert not [p for p in workdir.rglob("*") if "tmp" in p.name]


POINTS = [
    ("before", 10),
    ("written", 10),
    ("listed", 10),
    ("committed", 15),
    ("removing", 20),
    ("renaming", "metrics"),
    ("renaming", "toy"),
]


def test_kills_at_planted_points_leave_no_trace(start, tmp_path):
    killed, whole, steps = tmp_path / "killed", tmp_path / "whole", 25
    undisturbed = finish(*start(whole, steps))
    for point, at in POINTS:
        process, _ = start(killed, steps, point=point, at=at)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, point
    assert [p for p in killed.rglob("*") if "tmp" in p.name]  # of the last kill
    assert finish(*start(killed, steps)) == undisturbed
    assert undisturbed[:3] == (steps, None, steps)
    assert_same(killed, whole, steps)
    assert_nothing_left(killed, steps)


def kill_at_random_moments(start, tmp_path, kills: int, steps: int, seed: int) -> None:
    killed, whole, rng = tmp_path / "killed", tmp_path / "whole", random.Random(seed)
    undisturbed = finish(*start(whole, steps))
    reached = []
    for _ in range(kills):
        # At 20 ms and more a step, 0.3 seconds are not enough to come to the last one.
        process, _ = start(killed, steps, seconds=0.02)
        if rng.random() < 0.8:  # the others: while it starts, or looks for its checkpoint
            wait_for_step(process, killed, steps_of(killed) + rng.randrange(1, 12))
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(steps_of(killed))
    print("killed after steps", reached)
    assert finish(*start(killed, steps)) == undisturbed
    assert_same(killed, whole, steps)
    assert_nothing_left(killed, steps)


def test_kills_at_random_moments_leave_no_trace(start, tmp_path):
    kill_at_random_moments(start, tmp_path, kills=3, steps=150, seed=0)


@pytest.mark.slow
def test_20_kills_at_random_moments_leave_no_trace(start, tmp_path):
    kill_at_random_moments(start, tmp_path, kills=20, steps=1000, seed=1)


def test_sigterm_saves_within_seconds_and_is_no_failure(start, tmp_path):
    process, result = start(tmp_path, 10**6, seconds=0.01)
    wait_for_step(process, tmp_path, 7)
    process.terminate()
    process.join(60)  # seconds; without the signal it trains for hours
    assert process.exitcode == 0
    step, stopped_by, position, _ = result.get()
    assert stopped_by == "SIGTERM" and step == position == max(losses(tmp_path))
    assert (tmp_path / "checkpoints" / str(step)).is_dir()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_is_no_success(start, tmp_path, second):
    process, result = start(tmp_path, 100, hang_at=7)
    wait_for_step(process, tmp_path, 7)
    assert result.get() == "hangs"
    process.terminate()
    process.join(1)
    assert process.is_alive()  # it would save after the step that hangs
    os.kill(process.pid, second)
    process.join(60)  # it would hang for 1000
    assert process.exitcode == -second
