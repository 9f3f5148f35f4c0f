"""The window of metrics, metrics.jsonl and the images."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.train import metrics
from dalle2_jax.train.metrics import Reporter, Window


def entry(loss: float, skipped: float = 0.0):
    return jax.tree.map(jnp.float32, {"loss": loss, "grad_norm": 1.0, "skipped": skipped})


def test_window_averages_and_empties():
    window = Window()
    for loss in (1.0, 2.0, 6.0):
        window.add(entry(loss))
    assert window.mean() == {"loss": 3.0, "grad_norm": 1.0, "skipped": 0.0}
    assert window.mean() == {}


def test_steps_that_were_not_applied_are_counted_and_left_out():
    window = Window()
    for loss, skipped in ((1.0, 0), (np.nan, 1), (3.0, 0), (np.inf, 1)):
        window.add(entry(loss, skipped))
    assert window.mean() == {"loss": 2.0, "grad_norm": 1.0, "skipped": 2.0}
    window.add(entry(np.nan, 1))
    assert window.mean() == {"skipped": 1.0}


def test_a_window_that_nobody_reads_stays_small():
    window = Window(most=4)
    for step in range(1, 100):
        window.add(entry(step))
    assert len(window._steps) <= 8
    assert window.mean()["loss"] == pytest.approx(97, abs=3)  # of the newest


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped(tmp_path, capsys):
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        for step in (1, 2, 3):
            report.scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n7\n{"step": "x"}\n{"step": 4, "lo')  # the kill came here
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    with Reporter(tmp_path, 2, 2, tensorboard=False) as report:
        report.scalars(3, {"loss": 30})
    assert read(tmp_path) == [{"step": s, "loss": v} for s, v in ((1, 1), (2, 2), (3, 30))]
    assert "a broken line is dropped" in capsys.readouterr().err


def test_going_back_reads_like_a_run_that_was_killed(tmp_path):
    event = {"event": "rollback", "from": 5, "to": 2, "skipped_batches": [2, 5]}
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        for step in range(1, 6):
            report.scalars(step, {"loss": step})
        report.go_back(2, 5, event)
        report.scalars(3, {"loss": 30})
    told = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 2, **event}]
    assert read(tmp_path) == [*told, {"step": 3, "loss": 30}]
    with Reporter(tmp_path, 2, 5, tensorboard=False):  # a checkpoint of after the return
        assert read(tmp_path) == told
    with Reporter(tmp_path, 2, 2, tensorboard=False):  # of before: it will come to it again
        assert read(tmp_path) == told[:2]


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    (tmp_path / "previews").mkdir()
    left = [tmp_path / ".metrics.jsonl.x.tmp", tmp_path / "previews" / ".a.png.y.tmp"]
    for path in left:
        path.write_text("half")
    with Reporter(tmp_path, 0, 0, tensorboard=False):
        assert not any(path.exists() for path in left)


def test_log_tells_speed_and_time_left(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=100.0)
    monkeypatch.setattr(metrics, "time", clock)
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        report.restart_clock(0)
        clock.now += 3.0
        report.pause(1.0)  # of a second that previews took: two are left for the steps
        report.log(4, 40, 16, {"loss": 0.5})
    line = read(tmp_path)[0]
    assert line["steps_per_second"] == 2
    assert line["images_per_second"] == 32
    told = capsys.readouterr().out
    assert "step 4/40 (10.0 %)" in told and "loss 0.50000" in told and "0m18s left" in told


def test_images_are_png_files(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        report.images(12, {"decoder/grid": image})
    file = tmp_path / "previews" / "step_000012_decoder_grid.png"
    np.testing.assert_array_equal(np.asarray(Image.open(file)), image)


def test_a_full_disk_is_told_with_the_file(tmp_path):
    full = open("/dev/full", "w")  # noqa: SIM115 (the reporter closes it)
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        report._lines.close()
        report._lines = full
        with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
            report.scalars(1, {"loss": 1.0})


def test_training_goes_on_without_tensorboard(tmp_path, caplog):
    class Full:
        def write_scalars(self, step, values):
            raise RuntimeError("No space\nleft")

    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        report._clu = Full()
        for step in (1, 2):
            report.scalars(step, {"loss": 1.0})
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    told = [r.getMessage() for r in caplog.records]
    assert told == ["TensorBoard's files are no longer written (No space left)"]


def test_the_parameters_are_a_table_and_their_number(tmp_path, caplog):
    caplog.set_level("INFO")
    with Reporter(tmp_path, 0, 0, tensorboard=False) as report:
        report.parameters({"layer": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}})
    assert "layer/w" in caplog.text and "(2, 3)" in caplog.text and "Total: 9" in caplog.text


@pytest.mark.slow
def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    with Reporter(tmp_path, 0, 0, tensorboard=True) as report:
        report.parameters({"w": jnp.zeros((2, 3))})
        report.scalars(3, {"loss": 0.25})
        report.images(3, {"grid": np.zeros((4, 4, 3), np.uint8)})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert "loss" in tags["tensors"] and "grid" in tags["tensors"]
