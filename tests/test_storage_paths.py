"""gs:// wherever a path is taken, over a bucket in memory: no network, and no gcsfs needed."""

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
from dalle2_jax.storage import model_folder, paths
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
    """The address of an empty bucket; what is in it stands in fake_bucket.OBJECTS."""
    fake_bucket.OBJECTS.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server)
    monkeypatch.setattr(bucket_lib, "BEAT_SECONDS", 0.1)
    if request.param == "gcsfs":
        # Its look for buckets of a newer kind asks the cloud itself.
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
    """Those of steps, not of checkpoints."""
    told = map(json.loads, bucket_lib.BucketLines.read(workdir / "metrics.jsonl"))
    return [line for line in told if "checkpoint" not in line]


def test_a_run_in_a_bucket_goes_on_and_exports(bucket, orbax_in_bucket, one_device, tmp_path):
    train(tmp_path / "here", 12)
    place = f"{bucket}/runs/toy"
    train(place, 6, keep=2)
    assert not fake_bucket.names("bucket/runs/toy/.lock")
    result = train(place, 12, preview_every=12, profile=True)
    assert (result.step, result.stopped_by) == (12, None)
    workdir = paths.to_path(place)
    losses = {line["step"]: line["loss"] for line in lines(workdir)}
    assert losses == toy_task.losses(tmp_path / "here")  # it went on from step 6, to the bit
    there, here = (
        model_folder.read_params(model_folder.resolve(f), "toy")
        for f in (f"{place}/model", str(tmp_path / "here" / "model"))
    )
    np.testing.assert_array_equal(there["out"]["kernel"], here["out"]["kernel"])
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
def test_what_is_not_committed_in_a_bucket(bucket, orbax_in_bucket, one_device, caplog, lost):
    """The manifest is written just before Orbax's mark: with it the checkpoint is whole, without
    both a killed run was still writing it, and Orbax removes it."""
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


def test_a_run_in_a_bucket_goes_back(bucket, orbax_in_bucket, one_device, tmp_path):
    """Past batches that break it; what it logs is what a run on a disk does."""
    for place in (tmp_path / "here", f"{bucket}/runs/toy"):
        settings = toy_task.config(num_steps=12, max_skips=2, mesh=dict(data=1))
        loop.train(settings, toy_task.ToyTask(), toy_task.dataset(poison_at={9, 10}), place)
    there, here = (lines(paths.to_path(p)) for p in (f"{bucket}/runs/toy", tmp_path / "here"))
    assert [line["skipped_batches"] for line in there if "event" in line] == [[8, 11]]
    speed = ("steps_per_second", "images_per_second")
    assert [{k: v for k, v in line.items() if k not in speed} for line in there] == [
        {k: v for k, v in line.items() if k not in speed} for line in here
    ]


def test_what_was_logged_after_the_checkpoint_is_dropped(bucket):
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


def test_long_logs_are_not_written_anew_each_time(bucket, monkeypatch):
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
    first = bucket_lib.BucketLock(path)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "host": "elsewhere"}))  # as another machine sees it
    first._me["host"] = "elsewhere"
    with pytest.raises(UserError, match=r"another run .* on elsewhere\) is training in gs://buc"):
        bucket_lib.BucketLock(path)
    first.close()
    bucket_lib.BucketLock(path).close()
    assert not fake_bucket.names("bucket/run/")


def test_the_lock_of_a_dead_run_is_taken_over(bucket, caplog):
    path = paths.to_path(f"{bucket}/run/.lock")
    told = "takes over"
    path.write_text(json.dumps({"host": "gone", "pid": 1, "run": "x", "beat": 7}))
    bucket_lib.BucketLock(path).close()
    assert told in caplog.text  # it was watched
    caplog.clear()
    script = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(script, text=True, stdout=subprocess.PIPE, check=True).stdout
    owner = {"host": socket.gethostname(), "pid": int(dead), "run": "y", "beat": 7}
    path.write_text(json.dumps(owner))
    bucket_lib.BucketLock(path).close()
    assert told not in caplog.text  # a process of this machine is known to be dead
    assert not fake_bucket.names("bucket/run/")


def test_a_run_that_was_taken_over_stops(bucket, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(bucket_lib.os, "_exit", lambda status: stopped.set())
    path = paths.to_path(f"{bucket}/run/.lock")
    lock = bucket_lib.BucketLock(path)
    path.write_text(json.dumps({"host": "other", "pid": 1, "run": "x", "beat": 0}))
    assert stopped.wait(10)
    lock.close()


def test_a_lock_that_was_given_back_stops_nobody(bucket, monkeypatch):
    """Its last look may come late, when another run has the lock by right."""
    exits, looking, go_on = [], threading.Event(), threading.Event()
    monkeypatch.setattr(bucket_lib.os, "_exit", exits.append)
    monkeypatch.setattr(bucket_lib, "_LAST_BEAT", 0.1)
    path = paths.to_path(f"{bucket}/run/.lock")
    lock = bucket_lib.BucketLock(path)
    read = lock._read

    def slow():
        if threading.current_thread() is lock._thread:
            looking.set()
            assert go_on.wait(60)
        return read()

    monkeypatch.setattr(lock, "_read", slow)
    assert looking.wait(60)
    lock.close()
    second = bucket_lib.BucketLock(path)
    go_on.set()
    lock._thread.join(60)
    assert not exits and second._read()["run"] == second._me["run"]
    second.close()


def upload(folder, place):
    for file in Path(folder).rglob("*"):
        if file.is_file():
            name = f"{place.removeprefix('gs://')}/{file.relative_to(folder).as_posix()}"
            fake_bucket.put(name, file.read_bytes())


def test_weights_are_read_from_a_bucket(bucket):
    upload(model_folder.PACKAGED / "tiny", f"{bucket}/model")
    fake_bucket.put("bucket/model/deeper/large.safetensors", b"")  # of no stage: it is not fetched
    there, here = (DALLE2.from_pretrained(name) for name in (f"{bucket}/model", "tiny"))
    assert there.weights_hash == here.weights_hash and there.weights == f"{bucket}/model"
    np.testing.assert_array_equal(
        *(model.cascade.params["clip"]["text_tower"]["positions"] for model in (there, here))
    )


def test_pictures_are_written_into_a_bucket(bucket):
    out = files.prepare_folder(f"{bucket}/out")
    files.save_png(out / "cat.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a cat"})
    assert fake_bucket.names("bucket/out/") == ["bucket/out/cat.png"]
    assert fake_bucket.OBJECTS["bucket/out/cat.png"][0].startswith(b"\x89PNG")


def test_prompts_are_read_from_a_bucket(bucket):
    fake_bucket.put("bucket/prompts.txt", "\ufeffein Apfel, grün\n".encode())
    text = paths.to_path(f"{bucket}/prompts.txt").read_text(encoding="utf-8-sig")
    assert text == "ein Apfel, grün\n"


@pytest.mark.slow
def test_pictures_are_drawn_with_weights_in_a_bucket(bucket, folder):
    upload(folder, f"{bucket}/model")
    there, here = (
        DALLE2.from_pretrained(f).with_settings(steps=2) for f in (f"{bucket}/model", folder)
    )
    np.testing.assert_array_equal(
        there.generate(["a cat"], seed=3), here.generate(["a cat"], seed=3)
    )


def test_a_copy_is_fetched_again_only_where_it_changed(bucket):
    fake_bucket.put("bucket/set/a.txt", b"one")
    fake_bucket.put("bucket/set/sub/b.txt", b"two")
    fake_bucket.put("bucket/set/.hidden", b"")
    place = paths.to_path(f"{bucket}/set")
    copy = paths.local_copy(place)
    read = lambda: {p.name: p.read_text() for p in copy.rglob("*.txt")}  # noqa: E731
    assert read() == {"a.txt": "one", "b.txt": "two"}
    (copy / "a.txt").write_text("mine")  # unchanged there, so it is not fetched
    fake_bucket.put("bucket/set/sub/b.txt", b"TWO")
    assert paths.local_copy(place) == copy and read() == {"a.txt": "mine", "b.txt": "TWO"}
    del fake_bucket.OBJECTS["bucket/set/a.txt"]
    paths.local_copy(place)
    assert read() == {"b.txt": "TWO"}


def test_a_folder_of_pictures_in_a_bucket_is_read(bucket, tmp_path):
    files.save_png(tmp_path / "set" / "cat.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "set" / "cat.txt").write_text("a cat")
    upload(tmp_path / "set", f"{bucket}/set")
    examples = image_folder.open_folder(f"{bucket}/set")
    assert examples.captions == [["a cat"]] and examples.read(0)[:4] == b"\x89PNG"


def test_a_tfds_directory_keeps_its_address(bucket, monkeypatch):
    with pytest.raises(UserError, match="gs://bucket/none: no such folder"):
        tfds_folder.open_split(f"{bucket}/none")
    fake_bucket.put("bucket/set/dataset_info.json", b"{}")
    asked = []
    monkeypatch.setattr(tfds_folder.tfds, "builder_from_directory", asked.append)
    with pytest.raises(AttributeError):
        tfds_folder.open_split(f"{bucket}/set")
    assert asked == ["gs://bucket/set"]


def test_an_export_keeps_the_stages_that_are_there(bucket):
    folder = model_folder.PACKAGED / "tiny"
    upload(folder, f"{bucket}/model")
    model_folder.write_stage(f"{bucket}/model", "extra", {"a": 1}, {"w": np.ones(2)})
    stages = model_folder.read_config(f"{bucket}/model")["stages"]
    assert set(stages) == {*model_folder.read_config(folder)["stages"], "extra"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("s3://b/model", "s3://b/model: name a folder of this machine or gs://BUCKET/FOLDER"),
        ("gs://", "gs://: name a folder of this machine or gs://BUCKET/FOLDER"),
        ("gs://bucket/none", "gs://bucket/none does not exist or holds nothing to read"),
    ],
)
def test_a_wrong_address_is_told_in_one_line(bucket, name, told):
    with pytest.raises(UserError) as caught:
        DALLE2.from_pretrained(name)
    assert str(caught.value) == told


def test_a_bucket_that_refuses_is_told_in_one_line(bucket, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("Forbidden:\nno storage.objects.list access")

    monkeypatch.setattr(paths.to_path(f"{bucket}/x").fs, "find", refuse)
    with pytest.raises(UserError, match=r"^cannot read gs://bucket/x: Forbidden: no storage.obj"):
        DALLE2.from_pretrained(f"{bucket}/x")


def test_without_gcsfs_the_cure_is_told(tmp_path):
    hidden = "import sys; sys.modules['gcsfs'] = None\n"
    script = f"{hidden}from dalle2_jax import DALLE2\nDALLE2.from_pretrained('gs://b/model')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    assert "UserError: gs://b/model needs gcsfs: in the project's folder, pip" in done.stderr
