"""--config.profile=True: a trace where TensorBoard looks for it, and a run that is no worse."""

import jax
import pytest
import toy_task

from dalle2_jax.train import loop
from dalle2_jax.train import profile as profile_lib


def traces(workdir):
    return sorted(workdir.glob("plugins/profile/*/*.xplane.pb"))


def run(workdir, **changes):
    config = toy_task.config(mesh=dict(data=1), **changes)
    return loop.train(config, toy_task.ToyTask(), toy_task.dataset(), workdir)


@pytest.mark.parametrize("steps", [8, 4], ids=["whole", "the run ends within it"])
def test_a_trace_lies_where_tensorboard_looks(one_device, tmp_path, steps):
    run(tmp_path / "plain", num_steps=steps)
    run(tmp_path / "traced", num_steps=steps, profile=True)
    assert not traces(tmp_path / "plain")
    (trace,) = traces(tmp_path / "traced")
    found = jax.profiler.ProfileData.from_file(str(trace))
    names = {event.name for plane in found.planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names), sorted(names)[:50]
    assert toy_task.losses(tmp_path / "traced") == toy_task.losses(tmp_path / "plain")


def test_only_the_steps_after_compilation_are_traced(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    with profile_lib.Profile(True, tmp_path, start_step=100) as profile:
        for step in range(101, 120):
            profile(step, {})
    assert calls == [("start", 102), ("stop", 105)]  # after step 102: steps 103 to 105


def test_too_short_a_run_says_so(tmp_path, caplog):
    with profile_lib.Profile(True, tmp_path, start_step=0) as profile:
        profile(1, {})
    assert "no profile" in caplog.text and not traces(tmp_path)


def test_a_profile_that_cannot_be_written_does_not_end_training(monkeypatch, tmp_path, caplog):
    def fail():
        raise RuntimeError("No space left\non device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with profile_lib.Profile(True, tmp_path, start_step=0) as profile:
        for step in range(1, 10):
            profile(step, {})
    assert "No space left on device" in caplog.text
