"""Import and export at their edges: what lies beside a model, and what almost is one."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import small_karlo
from test_pretrained import Hub, change

from dalle2_jax import DALLE2
from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import find, names, recognise
from dalle2_jax.pretrained.convert import check_free, import_model
from dalle2_jax.pretrained.export import export_model
from dalle2_jax.storage import model_folder, model_names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def age(folder: Path) -> Path:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (0, 0))
    return folder


def test_what_the_user_keeps_beside_out_stays(theirs, tmp_path):
    kept, left = tmp_path / ".ours.backup", tmp_path / ".ours.abc.unfinished"
    for folder in (kept, left):
        folder.mkdir()
        (folder / "precious").write_text("x")
        age(folder)
    import_model(theirs, tmp_path / "ours")
    assert (kept / "precious").is_file() and not left.exists()


def test_beside_a_prior_the_image_tower_stays_behind(tmp_path):
    """As in a Karlo that was fine-tuned here on the CLIP of its image variations."""
    both = small_karlo.write(tmp_path / "both", variations=True)
    alone = small_karlo.write(tmp_path / "alone")
    entry = model_folder.read_stage(alone, "prior")
    entry["clip"] = model_folder.stage_hash(both, "clip")
    model_folder.write_stage(both, "prior", entry, model_folder.read_params(alone, "prior"))
    export_model(both, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "again")
    clip = model_folder.read_params(both, "clip")
    again = model_folder.read_params(tmp_path / "again", "clip")
    assert "image_tower" in clip and "image_tower" not in again
    np.testing.assert_array_equal(
        again["text_tower"]["projection"]["kernel"], clip["text_tower"]["projection"]["kernel"]
    )


@pytest.mark.parametrize(
    ("scheduler", "settings", "told"),
    [
        ("prior", {}, "prediction_type is 'epsilon', but of this network 'sample'"),
        ("decoder", {}, "variance_type is 'fixed_small_log', but of this network 'learned_range'"),
        ("super_res", {"variance_type": "learned_range"}, "but of this network 'fixed_small_log'"),
        ("decoder", {"prediction_type": "sample"}, "'sample', but of this network 'epsilon'"),
    ],
)
def test_the_schedule_of_another_network_is_told(scheduler, settings, told, theirs, tmp_path):
    path = theirs / f"{scheduler}_scheduler/scheduler_config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=told):
        import_model(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_every_solver_takes_the_steps_that_suit_it(karlo):
    """Even steps end in one long stride, over which dpm++ runs away."""
    model = DALLE2.from_pretrained(str(karlo))
    for solver, same in (("ddpm", "ddim"), ("dpm++", "unipc")):
        for stage, sampler in model.with_settings(solver=solver).cascade.samplers().items():
            steps = sampler.settings.schedule(sampler.process).timesteps
            other = model.with_settings(solver=same).cascade.samplers()[stage]
            np.testing.assert_array_equal(steps, other.settings.schedule(other.process).timesteps)
            even = len(set(np.diff(steps, 2))) <= 3  # but for rounding
            assert even == (solver == "ddpm"), (stage, steps)


@pytest.mark.parametrize("dtype", ["bf16", 3, "int8", "float64"])
def test_a_dtype_that_nothing_computes_in_is_told(dtype, karlo):
    with pytest.raises(UserError, match=f"dtype must be one of .*, not {dtype!r}"):
        DALLE2.from_pretrained(str(karlo), dtype=dtype)


def test_a_network_of_a_pipeline_is_told_where_the_whole_lies(theirs):
    with pytest.raises(UserError, match="one network of a model of diffusers: give the folder abo"):
        DALLE2.from_pretrained(str(theirs / "decoder"))


def test_the_licence_beside_a_file_is_not_the_files(tmp_path):
    (tmp_path / "LICENSE").write_text("of the project around it")
    (tmp_path / "ViT-B-32.pt").write_bytes(b"")
    assert recognise.licence_of(tmp_path / "ViT-B-32.pt") == ""
    assert "project" in recognise.licence_of(tmp_path)


def test_layers_are_stacked_in_the_order_of_memory():
    """Else the whole stage would be copied before it is written."""
    rules = [("a.{l}.weight", "a", names.MATRIX)]
    tensors = {f"a.{i}.weight": np.full((3, 5), i, np.float32) for i in range(4)}
    found = names.to_ours(rules, tensors, tensors.__getitem__).tensor("a")
    assert found.shape == (4, 5, 3) and found.flags.c_contiguous
    np.testing.assert_array_equal(found[:, 0, 0], range(4))


def test_a_hub_id_to_train_on_is_told_what_to_do_before_its_weights_are_fetched(
    theirs, tmp_path, monkeypatch
):
    hub = Hub(tmp_path / "snapshot", theirs)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match="dalle2 weights import kakaobrain/small --out FOLDER"):
        model_names.resolve("kakaobrain/small")
    assert not list(hub.root.rglob("*.safetensors"))


def test_pickles_are_fetched_in_a_second_call_where_there_is_nothing_else(
    theirs, tmp_path, monkeypatch
):
    for path in theirs.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    hub = Hub(tmp_path / "snapshot", theirs)
    calls = []
    fetch = hub.snapshot_download
    hub.snapshot_download = lambda *args, **options: (
        calls.append(options) or fetch(*args, **options)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    find.source("kakaobrain/small")
    assert len(calls) == 3  # settings, safetensors, pickles
    there = {path.relative_to(theirs) for path in theirs.rglob("*.bin")}
    assert there and {path.relative_to(hub.root) for path in hub.root.rglob("*.bin")} == there


def test_a_folder_of_two_layouts_is_read_by_one(theirs, tmp_path):
    """Transformers' where both lie there, with its own weights; OpenCLIP's where the config.json is
    of something else."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    (tmp_path / "clip/config.json").write_text(json.dumps({"architecture": "vit_base"}))
    with pytest.raises(UserError, match=r"open_clip_config\.json: width is missing"):
        import_model(tmp_path / "clip", tmp_path / "ours")
    change(tmp_path / "clip/config.json", model_type="clip")
    (tmp_path / "clip/open_clip_model.safetensors").write_bytes(b"OpenCLIP's")
    with pytest.raises(UserError, match=r"holds no weights: .* model.safetensors is missing"):
        import_model(tmp_path / "clip", tmp_path / "ours")


def test_a_name_that_no_folder_can_have_is_told(theirs, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: File name too long"):
        import_model(theirs, tmp_path / ("a" * 300))
    with pytest.raises(UserError, match=r"cannot write .*: File name too long"):
        check_free(tmp_path / ("a" * 300))
