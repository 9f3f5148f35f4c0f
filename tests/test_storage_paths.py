"""gs:// wherever a path is accepted, over a bucket in memory: needs neither network nor gcsfs."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fake_bucket
import fsspec
import numpy as np
import pytest
import toy_task
from fsspec.registry import _registry

from dalle2_jax import DALLE2
from dalle2_jax.data.sources import image_folder, tfds_folder
from dalle2_jax.errors import UserError
from dalle2_jax.imaging import files
from dalle2_jax.storage import cache, model_folder, model_names, paths
from dalle2_jax.train import bucket as bucket_lib
from dalle2_jax.train import loop, manifest

HAS_GCSFS = importlib.util.find_spec("gcsfs") is not None
REAL = [pytest.mark.slow, pytest.mark.skipif(not HAS_GCSFS, reason="needs gcsfs")]
CLIENTS = ["memory", pytest.param("gcsfs", marks=REAL)]


@pytest.fixture(scope="module")
def server():
    server = fake_bucket.serve()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(params=CLIENTS)
def bucket(request, server, monkeypatch, tmp_path):
    """The address of an empty bucket, whose contents are in fake_bucket.OBJECTS."""
    fake_bucket.OBJECTS.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server)
    monkeypatch.setattr(bucket_lib, "BEAT_SECONDS", 0.1)
    if request.param == "gcsfs":
        # Looking for buckets of a newer kind, gcsfs would ask the real cloud.
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        kind = gcsfs.GCSFileSystem
    else:
        kind = fake_bucket.MemoryBucket
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, kind, clobber=True)
    kind.clear_instance_cache()
    yield "gs://bucket"
    for name in ("gs", "gcs"):
        _registry.pop(name, None)
    kind.clear_instance_cache()


@pytest.fixture
def orbax_in_bucket(monkeypatch):
    from etils.epath import backend

    fake_bucket.set_up_orbax(monkeypatch.setattr)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    backend.fsspec_backend._get_filesystem.cache_clear()


def train(workdir, steps, **changes):
    settings = toy_task.config(num_steps=steps, mesh=dict(data=1), **changes)
    return loop.train(settings, toy_task.ToyTask(), toy_task.dataset(), workdir)


def lines(workdir):
    """The logged lines of steps, without those of checkpoints."""
    entries = map(json.loads, bucket_lib.BucketLines.read(workdir / "metrics.jsonl"))
    return [entry for entry in entries if "checkpoint" not in entry]


def test_a_run_in_a_bucket_resumes_and_exports(bucket, orbax_in_bucket, one_device, tmp_path):
    train(tmp_path / "local", 12)
    place = f"{bucket}/runs/toy"
    train(place, 6, keep=2)
    assert not fake_bucket.names("bucket/runs/toy/.lock")
    result = train(place, 12, preview_every=12, profile=True)
    assert (result.step, result.stopped_by) == (12, None)
    workdir = paths.to_path(place)
    losses = {line["step"]: line["loss"] for line in lines(workdir)}
    assert losses == toy_task.losses(tmp_path / "local")  # resumed at step 6, to the bit
    remote, local = (
        model_folder.read_params(model_names.resolve(f), "toy")
        for f in (f"{place}/model", str(tmp_path / "local" / "model"))
    )
    np.testing.assert_array_equal(remote["out"]["kernel"], local["out"]["kernel"])
    written = fake_bucket.names("bucket/runs/toy/")
    assert [n for n in written if n.endswith(".xplane.pb")]
    assert "bucket/runs/toy/previews/step_000012_first.png" in written
    steps = {name.split("/checkpoints/")[1].split("/")[0] for name in written if "/checkp" in name}
    assert steps == {"8", "12"}
    assert not (Path.cwd() / "gs:").exists()


@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, orbax_in_bucket, one_device, harm):
    place = f"{bucket}/runs/toy"
    train(place, 8)
    state = fake_bucket.names("bucket/runs/toy/checkpoints/8/state/")
    name = next(n for n in state if "/d/" in n)
    content = fake_bucket.OBJECTS.pop(name)[0]
    if harm == "flipped":
        fake_bucket.put(name, bytes([content[0] ^ 1]) + content[1:])
    assert train(place, 8).step == 8
    assert [line["step"] for line in lines(paths.to_path(place))] == list(range(1, 9))
    assert fake_bucket.names("bucket/runs/toy/broken_checkpoints/8.")


@pytest.mark.parametrize("lost", ["mark", "both"])
def test_uncommitted_checkpoints_in_a_bucket(bucket, orbax_in_bucket, one_device, caplog, lost):
    """The manifest is written just before Orbax's mark of a committed checkpoint. One with a
    manifest is complete; one with neither was still being written by a killed run, and Orbax
    removes it."""
    caplog.set_level("INFO")
    place = f"{bucket}/runs/toy"
    train(place, 8)
    del fake_bucket.OBJECTS["bucket/runs/toy/checkpoints/8/commit_success.txt"]
    if lost == "both":
        del fake_bucket.OBJECTS[f"bucket/runs/toy/checkpoints/8/{manifest.NAME}"]
    train(place, 12)
    step = 8 if lost == "mark" else 4
    assert f"resuming from step {step} of {place}" in caplog.text
    assert not fake_bucket.names("bucket/runs/toy/broken_checkpoints")
    assert [line["step"] for line in lines(paths.to_path(place))] == list(range(1, 13))


def test_a_run_in_a_bucket_recovers(bucket, orbax_in_bucket, one_device, tmp_path):
    """From batches that break it, logging what a run on a disk does."""
    for place in (tmp_path / "local", f"{bucket}/runs/toy"):
        settings = toy_task.config(num_steps=12, max_skips=2, mesh=dict(data=1))
        loop.train(settings, toy_task.ToyTask(), toy_task.dataset(poison_at={9, 10}), place)
    remote, local = (lines(paths.to_path(p)) for p in (f"{bucket}/runs/toy", tmp_path / "local"))
    assert [line["skipped_batches"] for line in remote if "event" in line] == [[8, 11]]
    speed = ("steps_per_second", "images_per_second")
    assert [{k: v for k, v in line.items() if k not in speed} for line in remote] == [
        {k: v for k, v in line.items() if k not in speed} for line in local
    ]


def test_lines_logged_after_the_checkpoint_are_dropped(bucket):
    path = paths.to_path(f"{bucket}/run/metrics.jsonl")
    log = bucket_lib.BucketLines(path)
    for step in range(1, 4):
        log.write(json.dumps({"step": step}) + "\n")
        log.flush()
    assert [line["step"] for line in lines(path.parent)] == [1, 2, 3]
    from dalle2_jax.train.metrics import _reopen

    log = _reopen(path, 2, 2)
    log.write(json.dumps({"step": 3, "again": True}) + "\n")
    log.flush()
    assert [line.get("again", False) for line in lines(path.parent)] == [False, False, True]


def test_long_logs_are_not_rewritten_each_time(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lib, "_PART_BYTES", 20)
    path = paths.to_path(f"{bucket}/run/metrics.jsonl")
    log = bucket_lib.BucketLines(path)
    for step in range(30):
        log.write(json.dumps({"step": step}) + "\n")
        log.flush()
    assert len(fake_bucket.names("bucket/run/metrics.")) == 15
    assert [line["step"] for line in lines(path.parent)] == list(range(30))


def test_a_second_run_is_refused_while_the_first_lives(bucket):
    path = paths.to_path(f"{bucket}/run/.lock")
    first = bucket_lib.HeartbeatLock(path)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "host": "elsewhere"}))  # what another machine reads
    first._me["host"] = "elsewhere"
    with pytest.raises(UserError, match=r"another run .* on elsewhere\) is training in gs://buc"):
        bucket_lib.HeartbeatLock(path)
    first.close()
    bucket_lib.HeartbeatLock(path).close()
    assert not fake_bucket.names("bucket/run/")


def test_the_lock_of_a_dead_run_is_taken_over(bucket, caplog):
    path = paths.to_path(f"{bucket}/run/.lock")
    message = "takes over"
    path.write_text(json.dumps({"host": "gone", "pid": 1, "run": "x", "beat": 7}))
    bucket_lib.HeartbeatLock(path).close()
    assert message in caplog.text  # after the lock was watched for a while
    caplog.clear()
    script = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(script, text=True, stdout=subprocess.PIPE, check=True).stdout
    owner = {"host": socket.gethostname(), "pid": int(dead), "run": "y", "beat": 7}
    path.write_text(json.dumps(owner))
    bucket_lib.HeartbeatLock(path).close()
    assert message not in caplog.text  # at once: a dead process of this machine
    assert not fake_bucket.names("bucket/run/")


def test_a_run_that_was_taken_over_stops(bucket, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(bucket_lib.os, "_exit", lambda status: stopped.set())
    path = paths.to_path(f"{bucket}/run/.lock")
    lock = bucket_lib.HeartbeatLock(path)
    path.write_text(json.dumps({"host": "other", "pid": 1, "run": "x", "beat": 0}))
    assert stopped.wait(60)
    lock.close()


def test_a_released_lock_stops_nobody(bucket, monkeypatch):
    """Its thread may read the lock once more after the next run has acquired it."""
    exits, reading, resume = [], threading.Event(), threading.Event()
    monkeypatch.setattr(bucket_lib.os, "_exit", exits.append)
    monkeypatch.setattr(bucket_lib, "_LAST_BEAT", 0.1)
    path = paths.to_path(f"{bucket}/run/.lock")
    lock = bucket_lib.HeartbeatLock(path)
    read = lock._read

    def slow():
        if threading.current_thread() is lock._thread:
            reading.set()
            assert resume.wait(60)
        return read()

    monkeypatch.setattr(lock, "_read", slow)
    assert reading.wait(60)
    lock.close()
    second = bucket_lib.HeartbeatLock(path)
    resume.set()
    lock._thread.join(60)
    assert not exits and second._read()["run"] == second._me["run"]
    second.close()


def upload(folder, place):
    for file in Path(folder).rglob("*"):
        if file.is_file():
            name = f"{place.removeprefix('gs://')}/{file.relative_to(folder).as_posix()}"
            fake_bucket.put(name, file.read_bytes())


def test_weights_are_read_from_a_bucket(bucket):
    upload(model_names.PACKAGED / "tiny", f"{bucket}/model")
    fake_bucket.put("bucket/model/deeper/large.safetensors", b"")  # of no stage, so not fetched
    remote, local = (DALLE2.from_pretrained(name) for name in (f"{bucket}/model", "tiny"))
    assert remote.weights_hash == local.weights_hash and remote.weights == f"{bucket}/model"
    np.testing.assert_array_equal(
        *(model.cascade.params["clip"]["text_tower"]["positions"] for model in (remote, local))
    )


def test_images_are_written_into_a_bucket(bucket):
    out = paths.prepare_folder(f"{bucket}/out")
    files.save_png(out / "cat.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a cat"})
    assert fake_bucket.names("bucket/out/") == ["bucket/out/cat.png"]
    assert fake_bucket.OBJECTS["bucket/out/cat.png"][0].startswith(b"\x89PNG")


def test_prompts_are_read_from_a_bucket(bucket):
    fake_bucket.put("bucket/prompts.txt", "\ufeffein Apfel, grün\n".encode())
    text = paths.to_path(f"{bucket}/prompts.txt").read_text(encoding="utf-8-sig")
    assert text == "ein Apfel, grün\n"


@pytest.mark.slow
def test_images_are_generated_with_weights_in_a_bucket(bucket, folder):
    upload(folder, f"{bucket}/model")
    remote, local = (
        DALLE2.from_pretrained(f).with_settings(steps=2) for f in (f"{bucket}/model", folder)
    )
    np.testing.assert_array_equal(
        remote.generate(["a cat"], seed=3), local.generate(["a cat"], seed=3)
    )


def test_only_changed_files_are_fetched_again(bucket):
    fake_bucket.put("bucket/set/a.txt", b"one")
    fake_bucket.put("bucket/set/sub/b.txt", b"two")
    fake_bucket.put("bucket/set/.hidden", b"")
    place = paths.to_path(f"{bucket}/set")
    copy = cache.local_copy(place)
    read = lambda: {p.name: p.read_text() for p in copy.rglob("*.txt")}  # noqa: E731
    assert read() == {"a.txt": "one", "b.txt": "two"}
    (copy / "a.txt").write_text("mine")  # unchanged in the bucket, so not fetched
    fake_bucket.put("bucket/set/sub/b.txt", b"TWO")
    assert cache.local_copy(place) == copy and read() == {"a.txt": "mine", "b.txt": "TWO"}
    del fake_bucket.OBJECTS["bucket/set/a.txt"]
    cache.local_copy(place)
    assert read() == {"b.txt": "TWO"}


def test_a_folder_of_images_in_a_bucket_is_read(bucket, tmp_path):
    files.save_png(tmp_path / "set" / "cat.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "set" / "cat.txt").write_text("a cat")
    upload(tmp_path / "set", f"{bucket}/set")
    examples = image_folder.open_folder(f"{bucket}/set")
    assert examples.captions == [["a cat"]] and examples.read(0)[:4] == b"\x89PNG"


def test_a_tfds_directory_keeps_its_address(bucket, monkeypatch):
    with pytest.raises(UserError, match="gs://bucket/none: no such folder"):
        tfds_folder.open_split(f"{bucket}/none")
    fake_bucket.put("bucket/set/dataset_info.json", b"{}")
    addresses = []
    monkeypatch.setattr(tfds_folder.tfds, "builder_from_directory", addresses.append)
    with pytest.raises(AttributeError):
        tfds_folder.open_split(f"{bucket}/set")
    assert addresses == ["gs://bucket/set"]


def test_an_export_keeps_the_other_stages(bucket):
    folder = model_names.PACKAGED / "tiny"
    upload(folder, f"{bucket}/model")
    model_folder.write_stage(f"{bucket}/model", "extra", {"a": 1}, {"w": np.ones(2)})
    stages = model_folder.read_config(f"{bucket}/model")["stages"]
    assert set(stages) == {*model_folder.read_config(folder)["stages"], "extra"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://b/model", "s3://b/model: name a folder of this machine or gs://BUCKET/FOLDER"),
        ("gs://", "gs://: name a folder of this machine or gs://BUCKET/FOLDER"),
        ("gs://bucket/none", "gs://bucket/none does not exist or holds nothing to read"),
    ],
)
def test_a_wrong_address_is_an_error_of_one_line(bucket, name, message):
    with pytest.raises(UserError) as error:
        DALLE2.from_pretrained(name)
    assert str(error.value) == message


def test_a_bucket_that_refuses_is_an_error_of_one_line(bucket, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("Forbidden:\nno storage.objects.list access")

    monkeypatch.setattr(paths.to_path(f"{bucket}/x").fs, "find", refuse)
    with pytest.raises(UserError, match=r"^cannot read gs://bucket/x: Forbidden: no storage.obj"):
        DALLE2.from_pretrained(f"{bucket}/x")


def test_without_gcsfs_the_error_says_how_to_install_it():
    hidden = "import sys; sys.modules['gcsfs'] = None\n"
    script = f"{hidden}from dalle2_jax import DALLE2\nDALLE2.from_pretrained('gs://b/model')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    assert "UserError: gs://b/model needs gcsfs: in the project's folder, pip" in done.stderr
