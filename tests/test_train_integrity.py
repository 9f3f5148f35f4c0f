"""Whatever happens to the files of a checkpoint is seen before it is restored, or does no harm."""

import json
import random
import shutil

import jax
import numpy as np
import pytest
from toy_task import ToyTask, config, dataset

from dalle2_jax.errors import UserError
from dalle2_jax.parallel import sharding
from dalle2_jax.train import loop, manifest
from dalle2_jax.train.checkpoint import Checkpoints
from dalle2_jax.train.optimizer import make_optimizer
from dalle2_jax.train.state import abstract_state, init_state


def template_of():
    cfg, task = config(), ToyTask()
    opt = make_optimizer(cfg.optimizer, cfg.num_steps)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    template = abstract_state(task, opt, 0, mesh, cfg.sharding_rules)
    return template, lambda: init_state(task, opt, 0, template)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a workdir with steps 4 and 8, whose scores are kept; {step: its state})."""
    folder = tmp_path_factory.mktemp("whole")
    _, make = template_of()
    states = {}
    with Checkpoints(folder, 3, "eval/loss") as checkpoints:
        for step in (4, 8):
            state = make()
            state = state.replace(
                step=state.step + step, params=jax.tree.map(lambda x, s=step: x + s, state.params)
            )
            checkpoints.save(state, {"eval/loss": 1 / step})
            states[step] = jax.device_get(state)
    return folder, states


def restore(folder, template):
    with Checkpoints(folder, 3, "eval/loss") as checkpoints:
        return checkpoints.restore_latest(template)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_every_file_is_listed_but_the_mark_of_the_commit(whole):
    folder = whole[0] / "checkpoints" / "8"
    listed = json.loads((folder / manifest.NAME).read_text())
    there = {str(p.relative_to(folder)) for p in files_of(folder)}
    assert there - set(listed) == {manifest.NAME, "commit_success.txt"}
    assert not set(listed) - there and len(listed) > 10
    assert manifest.fault(folder) == ""


def test_the_manifest_is_there_before_the_checkpoint_is(tmp_path, one_device, monkeypatch):
    seen, write = [], manifest.write

    def spy(folder):
        write(folder)
        others = [p.name for p in folder.parent.iterdir() if p.name.isdigit()]
        seen.append((folder.name.partition(".")[0], others))

    monkeypatch.setattr(manifest, "write", spy)
    loop.train(config(num_steps=8), ToyTask(), dataset(), tmp_path)
    assert seen == [("4", []), ("8", ["4"])]


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path, rng):
    path.unlink()


def harm_and_restore(whole, folder, seed: int) -> str:
    """One random harm to one file of step 8; raises where another state than that of a step comes
    back. Returns what became of it."""
    (source, states), rng = whole, random.Random(seed)
    shutil.copytree(source, folder)
    files = files_of(folder / "checkpoints" / "8")
    path, harm = files[seed % len(files)], rng.choice([flip, flip, truncate, delete])
    harm(path, rng)
    restored = restore(folder, template_of()[0])
    assert restored is not None, f"a silent start from step 0 after {harm.__name__} of {path}"
    step = int(restored.step)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(states[step]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"silently wrong: {harm.__name__} of {path}")
    aside = [p.name.split(".")[0] for p in (folder / "broken_checkpoints").glob("*")]
    assert aside == ([] if step == 8 else ["8"])
    shutil.rmtree(folder)
    return "harmless" if step == 8 else "detected"


def check_outcomes(whole, tmp_path, seeds) -> dict[str, int]:
    outcomes = [harm_and_restore(whole, tmp_path / str(seed), seed) for seed in seeds]
    return {name: outcomes.count(name) for name in ("detected", "harmless")}


def test_no_harm_to_a_file_goes_unseen(whole, tmp_path):
    files = len(files_of(whole[0] / "checkpoints" / "8"))
    assert check_outcomes(whole, tmp_path, range(files))["detected"] >= files - 2  # each once


@pytest.mark.slow
def test_200_times_no_harm_to_a_file_goes_unseen(whole, tmp_path):
    found = check_outcomes(whole, tmp_path, range(200))
    print(found)
    assert found["detected"] >= 180 and sum(found.values()) == 200


def test_a_run_falls_back_and_says_so(tmp_path, one_device, caplog):
    caplog.set_level("INFO")
    cfg = config()
    whole = loop.train(cfg, ToyTask(), dataset(), tmp_path)
    data = next((tmp_path / "checkpoints" / "12" / "state" / "d").iterdir())
    flip(data, random.Random(0))
    again = loop.train(cfg, ToyTask(), dataset(), tmp_path)
    told = [r.getMessage() for r in caplog.records]
    assert any(m.startswith("CHECKPOINT 12 IS DAMAGED: state/d/") for m in told)
    assert any(m.startswith("resuming from step 8 ") for m in told)
    assert again.step == 12
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("harm", ["manifest", "all", "file", "hashes"])
def test_what_is_no_checkpoint_is_never_taken_for_one(whole, tmp_path, harm):
    shutil.copytree(whole[0], tmp_path / "w")
    folder = tmp_path / "w" / "checkpoints" / "8"
    if harm == "manifest":
        (folder / manifest.NAME).unlink()
    elif harm == "hashes":
        (folder / manifest.NAME).write_text("{}")
    else:
        shutil.rmtree(folder)
        folder.write_text("") if harm == "file" else folder.mkdir()
    assert int(restore(tmp_path / "w", template_of()[0]).step) == 4
    assert [p.name.split(".")[0] for p in (tmp_path / "w" / "broken_checkpoints").iterdir()] == [
        "8"
    ]


def test_a_step_that_was_taken_away_is_gone_on_from_the_one_before(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "8")
    assert int(restore(tmp_path / "w", template_of()[0]).step) == 4
    assert not (tmp_path / "w" / "broken_checkpoints").exists()


def test_a_disk_that_cannot_be_read_is_told_and_nothing_is_moved(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "w")

    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_sha256", fail)
        with pytest.raises(UserError, match=r"cannot read .*Input/output error"):
            restore(tmp_path / "w", template_of()[0])
    assert int(restore(tmp_path / "w", template_of()[0]).step) == 8
