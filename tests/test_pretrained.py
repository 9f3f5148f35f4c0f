"""Other programs' models: import, export, the same again; the licence; what is wrong with them."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import small_karlo
from safetensors.numpy import load_file, save_file

from dalle2_jax import DALLE2
from dalle2_jax.errors import UserError
from dalle2_jax.pretrained import find
from dalle2_jax.pretrained.convert import import_model
from dalle2_jax.pretrained.export import export_model
from dalle2_jax.storage import licence, model_folder, model_names

STEPS = {"prior": 2, "decoder": 2, "upsampler_16": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dalle2_jax"


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors_of(folder: Path) -> dict:
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(a: Path, b: Path) -> None:
    ours, others = tensors_of(a), tensors_of(b)
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype, name
        assert tensor.tobytes() == others[name].tobytes(), name


@pytest.mark.parametrize("variations", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_there_and_back_is_the_same_bit_for_bit(tmp_path, dtype, variations):
    ours = small_karlo.write(tmp_path / "ours", variations, dtype)
    export_model(ours, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "again")
    assert_same_bits(ours, tmp_path / "again")
    assert model_folder.read_config(ours) == model_folder.read_config(tmp_path / "again")
    export_model(tmp_path / "again", tmp_path / "theirs again")
    assert_same_bits(tmp_path / "theirs", tmp_path / "theirs again")


def test_it_is_stored_in_the_type_that_is_asked_for(theirs, tmp_path):
    import_model(theirs, tmp_path / "ours", "bfloat16")
    assert {tensor.dtype.name for tensor in tensors_of(tmp_path / "ours").values()} == {"bfloat16"}


def test_every_network_has_files_of_its_own_there(theirs):
    index = json.loads((theirs / "model_index.json").read_text())
    assert {name for name in index if name[0] != "_"} == {p.name for p in theirs.iterdir()} - {
        "model_index.json"
    }
    assert not list(theirs.parent.glob(".*"))


def test_a_folder_of_theirs_draws_as_it_is(karlo, theirs, cache):
    drawn = [
        DALLE2.from_pretrained(str(folder)).with_settings(steps=STEPS).generate("a red apple")
        for folder in (karlo, theirs)
    ]
    np.testing.assert_array_equal(*drawn)
    (made,) = (cache / "imported").glob("[!.]*")
    before = made.stat().st_ino
    DALLE2.from_pretrained(str(theirs))  # from the cache
    assert [p.stat().st_ino for p in (cache / "imported").glob("[!.]*")] == [before]
    shapes = load_file(theirs / "prior/diffusion_pytorch_model.safetensors")
    save_file({k: v + 1 for k, v in shapes.items()}, theirs / "prior/model.safetensors")
    DALLE2.from_pretrained(str(theirs))  # what has changed is read anew
    assert len(list((cache / "imported").glob("[!.]*"))) == 2


def test_its_256_px_go_on_to_a_larger_upsampler_of_ours(karlo, tmp_path):
    folder = Path(shutil.copytree(karlo, tmp_path / "chained"))
    entries = small_karlo.entries()
    entry = entries["upsampler_16"] | {"image_size": 32, "low_size": 16}
    del entry["separate_last_step"]
    params = model_folder.read_params(karlo, "upsampler_16")["first"]
    model_folder.write_stage(folder, "upsampler_32", entry, params)
    model = DALLE2.from_pretrained(str(folder)).with_settings(steps=STEPS | {"upsampler_32": 2})
    drawn = model.generate("a red apple")
    assert drawn.shape == (1, 32, 32, 3)


def test_an_image_depends_on_every_stage_and_on_the_caption(karlo, tmp_path):
    """Else the tests of whole images would show nothing."""
    model = DALLE2.from_pretrained(str(karlo)).with_settings(steps=STEPS)
    other = DALLE2.from_pretrained(str(small_karlo.write(tmp_path / "other", seed=1)))
    drawn = model.generate("a red apple")

    def changed(images) -> float:
        return (np.abs(images.astype(int) - drawn) > 2).mean()

    assert changed(model.generate("dog, flat")) > 0.1
    for stage in model.cascade.params:
        params = {**model.cascade.params, stage: other.cascade.params[stage]}
        cascade = dataclasses.replace(model.cascade, params=params)
        mixed = dataclasses.replace(model, cascade=cascade)
        assert changed(mixed.generate("a red apple")) > 0.1, stage


def test_our_solvers_work_on_its_schedule(karlo):
    """Both come to the end of one path."""
    model = DALLE2.from_pretrained(str(karlo))

    def drawn(solver: str, steps: int) -> np.ndarray:
        set_so = model.with_settings(solver={"prior": solver}, steps={"prior": steps})
        return set_so.sample_prior(["a red apple", "dog, flat"], n=4)

    end = drawn("ddim", 400)

    def error(solver: str, steps: int) -> float:
        return float(np.linalg.norm(drawn(solver, steps) - end) / np.linalg.norm(end))

    assert error("ddim", 100) < error("ddim", 25) / 2
    assert error("dpm++", 25) < min(0.03, error("dpm++", 5) / 2)


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Karlo", "CreativeML Open RAIL-M"),
        ("---\nlicense: mit\n---\n", "mit, as the model card of theirs says"),
    ],
)
def test_the_licence_is_shown_once_and_stays_with_the_weights(theirs, tmp_path, capsys, card, told):
    (theirs / "README.md").write_text(card)
    folder = find.model(str(theirs))
    shown = capsys.readouterr().err
    assert told in shown
    assert ("To provide medical advice" in shown) == ("RAIL" in told)  # a restriction of its use
    assert told in licence.read(folder)
    find.model(str(theirs))
    assert capsys.readouterr().err == ""
    export_model(folder, tmp_path / "exported")
    import_model(tmp_path / "exported", tmp_path / "again")
    assert licence.read(tmp_path / "again") == licence.read(folder)


def test_karlo_is_known_by_its_name_where_nothing_tells_the_licence(theirs, tmp_path):
    change(theirs / "model_index.json", _name_or_path="kakaobrain/karlo-v1-alpha")
    import_model(theirs, tmp_path / "ours")
    assert licence.read(tmp_path / "ours") == licence.OPENRAIL_M.read_text()


def test_two_licences_stand_one_after_the_other(tmp_path):
    for text in ("one\n", "two\n", "one\n"):
        licence.add(text, tmp_path)
    both = licence.read(tmp_path)
    assert both.count("one") == both.count("two") == 1
    (tmp_path / "other").mkdir()
    licence.add("two\n", tmp_path / "other")
    licence.add(both, tmp_path / "other")  # of weights that come from both
    told = licence.read(tmp_path / "other")
    assert told.count("one") == told.count("two") == 1 and told.index("two") < told.index("one")


def test_of_two_licences_each_is_shown_with_its_own_restrictions(tmp_path, capsys):
    licence.add("Rail\nsection 1\n\nAttachment A\n\nNot for harm.\n", tmp_path)
    licence.show_once(tmp_path)
    assert "Rail" in capsys.readouterr().err
    for text in ("Plain\n(c) Makers\nsection 2\n", "Other\n\nAttachment A\n\nNot for war.\n"):
        licence.add(text, tmp_path)
    licence.show_once(tmp_path)
    shown = capsys.readouterr().err
    assert "Plain" in shown and "Other" in shown and shown.count("Not for war.") == 1
    for hidden in ("Rail", "section", "harm", "===="):  # shown before, or no restriction
        assert hidden not in shown
    licence.show_once(tmp_path)
    assert capsys.readouterr().err == ""


def drop(path: Path, name: str):
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


PRIOR, DECODER = (f"{n}/diffusion_pytorch_model.safetensors" for n in ("prior", "decoder"))
HARMS = {
    "a folder that is missing": (
        lambda f: shutil.rmtree(f / "text_proj"),
        "text_proj/config.json is missing: copy the whole model again",
    ),
    "weights that are missing": (
        lambda f: (f / PRIOR).unlink(),
        "prior holds no weights: diffusion_pytorch_model.safetensors or model.safetensors is",
    ),
    "cut short": (
        lambda f: (f / DECODER).write_bytes((f / DECODER).read_bytes()[:-100]),
        "decoder/diffusion_pytorch_model.safetensors is damaged or cut short",
    ),
    "a tensor that is missing": (
        lambda f: drop(f / PRIOR, "proj_in.bias"),
        "prior is another network; missing: x_t.bias",
    ),
    "a tensor too many": (
        lambda f: save_file(load_file(f / PRIOR) | {"more": np.zeros(1)}, f / PRIOR),
        "prior is another network; unknown: prior/more",
    ),
    "a tensor of another shape": (
        lambda f: save_file(
            load_file(f / PRIOR) | {"proj_in.bias": np.zeros(3, np.float32)}, f / PRIOR
        ),
        r"prior is another network: x_t.bias is \(3,\), not \(16,\)",
    ),
    "another model": (
        lambda f: change(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "StableDiffusionPipeline is not read here, but UnCLIPPipeline",
    ),
    "no name": (
        lambda f: change(f / "model_index.json", _class_name=None),
        "model_index.json: None is not read here",
    ),
    "weights of whole numbers": (
        lambda f: save_file(
            load_file(f / PRIOR) | {"proj_in.bias": np.zeros(16, np.int64)}, f / PRIOR
        ),
        "prior: x_t.bias is of int64, which no weights are",
    ),
    "weights that are not finite": (
        lambda f: save_file(
            load_file(f / PRIOR) | {"proj_in.bias": np.full(16, np.nan, np.float32)}, f / PRIOR
        ),
        "theirs: prior: x_t.bias is not finite: copy the model again",
    ),
    "shards that are none": (
        lambda f: (
            (f / PRIOR).unlink(),
            (f / f"{PRIOR}.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        ),
        r"index\.json names no files of this folder",
    ),
    "one layer twice": (
        lambda f: save_file(
            load_file(f / PRIOR) | {"transformer_blocks.00.norm1.bias": np.zeros(16, np.float32)},
            f / PRIOR,
        ),
        "transformer_blocks.0.norm1.bias are one tensor of ours",
    ),
    "a list for a name": (
        lambda f: change(f / "model_index.json", _class_name=[]),
        r"model_index.json: \[\] is not read here",
    ),
    "a number beyond all": (
        lambda f: change(f / "prior_scheduler/scheduler_config.json", clip_sample_range=10**400),
        "clip_sample_range is 1000+, not a number",
    ),
    "settings that are no JSON": (
        lambda f: (f / "prior/config.json").write_text("{"),
        "prior/config.json is not valid JSON",
    ),
    "a text for a number": (
        lambda f: change(f / "prior/config.json", num_layers="two"),
        "prior/config.json: num_layers is 'two', not a whole number",
    ),
    "a list for a number": (
        lambda f: change(f / "decoder/config.json", sample_size=[8]),
        r"decoder/config.json: sample_size is \[8\], not a whole number",
    ),
    "a number for a list": (
        lambda f: change(f / "decoder/config.json", block_out_channels=8),
        "decoder/config.json: block_out_channels is 8, not a list",
    ),
    "widths that are texts": (
        lambda f: change(f / "decoder/config.json", block_out_channels=["a", "b"]),
        "decoder/config.json: block_out_channels is .*, not a list of whole numbers",
    ),
    "no width": (
        lambda f: change(f / "text_encoder/config.json", hidden_size=0),
        "text_encoder/config.json: hidden_size is 0, not a whole number",
    ),
    "another block": (
        lambda f: change(
            f / "decoder/config.json",
            down_block_types=["DownBlock2D"] * 2,
            up_block_types=["UpBlock2D"] * 2,
        ),
        "a block 'DownBlock2D' is not read here",
    ),
    "another schedule": (
        lambda f: change(f / "decoder_scheduler/scheduler_config.json", _class_name="DDIM"),
        "_class_name is 'DDIM', but this reads 'UnCLIPScheduler' alone",
    ),
    "a bound that is a text": (
        lambda f: change(f / "prior_scheduler/scheduler_config.json", clip_sample_range="x"),
        "clip_sample_range is 'x', not a number",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_left(theirs, tmp_path, cache, harm):
    act, told = HARMS[harm]
    act(theirs)
    with pytest.raises(UserError, match=told) as error:
        import_model(theirs, tmp_path / "made" / "ours")
    assert "\n" not in str(error.value) and str(theirs) in str(error.value)
    assert not list((tmp_path / "made").glob("*")) if (tmp_path / "made").exists() else True
    with pytest.raises(UserError, match=told):
        find.model(str(theirs))
    assert not list(cache.glob("imported/[!.]*"))


def test_out_that_is_there_or_cannot_be(theirs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is there already: give another"):
        import_model(theirs, tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/below"):
        import_model(theirs, tmp_path / "file" / "below")


def test_where_ours_is_wanted_theirs_says_how_to_import_it(theirs):
    with pytest.raises(
        UserError, match=r"is a model of diffusers, .*: run dalle2 weights import .* --out"
    ):
        model_folder.read_config(theirs)


@pytest.mark.parametrize(
    ("stage", "section", "key", "value", "told"),
    [
        ("decoder", "model", "learned_null", True, "learned_null is True, there it can be False"),
        ("clip", "model", "unit_length", True, "unit_length is True, there it can be False alone"),
        ("prior", "diffusion", "prediction", "v", "prediction is 'v', but UnCLIPScheduler has"),
        ("decoder", "diffusion", "schedule", "linear", "schedule is 'linear', there it can be"),
        ("decoder", "sampling", "clip", ["dynamic", 0.9], "clip is .*'dynamic'.* can be"),
    ],
)
def test_what_theirs_cannot_say_is_not_exported(karlo, tmp_path, stage, section, key, value, told):
    folder = Path(shutil.copytree(karlo, tmp_path / "ours"))
    config = json.loads((folder / "config.json").read_text())
    config["stages"][stage][section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        export_model(folder, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_is_damaged_is_not_exported(karlo, tmp_path):
    folder = Path(shutil.copytree(karlo, tmp_path / "ours"))
    path, whole = folder / "prior.safetensors", load_file(folder / "prior.safetensors")
    for name, x in (("x_t.bias", np.zeros(3, np.float32)), ("mean", whole["mean"] * np.nan)):
        save_file(whole | {name: x}, path)
        with pytest.raises(UserError, match=rf"prior\.safetensors is damaged: {name} is"):
            export_model(folder, tmp_path / "theirs")
    drop(path, "x_t.bias")
    with pytest.raises(UserError, match=r"another network: x_t\.bias is unknown or missing"):
        export_model(folder, tmp_path / "theirs")
    save_file(whole, path)
    change_stage = json.loads((folder / "config.json").read_text())
    del change_stage["stages"]["decoder"]["diffusion"]
    (folder / "config.json").write_text(json.dumps(change_stage))
    with pytest.raises(UserError, match=r"config\.json is damaged \(KeyError: 'diffusion'\)"):
        export_model(folder, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_is_exported_is_for_all_to_read(theirs):
    modes = {path.stat().st_mode & 0o777 for path in theirs.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_another_cascade_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="has one upsampler, of two networks"):
        export_model(model_names.resolve("tiny"), tmp_path / "theirs")


class Hub:
    """huggingface_hub over a folder, by owner/name."""

    def __init__(self, root: Path, away: Path):
        self.root, self.away, self.asked = root, away, []

    def snapshot_download(self, hub_id, allow_patterns):
        if hub_id != "kakaobrain/small":
            raise RuntimeError("401 Client Error\nRepository Not Found")
        import fnmatch

        self.asked += allow_patterns
        for path in self.away.rglob("*"):
            name = str(path.relative_to(self.away))
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.root / name)
        return str(self.root)


def test_a_hub_id_is_fetched_without_what_is_not_read(karlo, theirs, tmp_path, monkeypatch):
    (theirs / "safety_checker").mkdir()
    (theirs / "safety_checker/model.safetensors").write_bytes(b"large")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (theirs / "prior" / name).write_bytes(b"large")
    hub = Hub(tmp_path / "snapshot", theirs)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    folder = find.model("kakaobrain/small")
    assert_same_bits(karlo, folder)
    assert not list(hub.root.rglob("safety_checker/*")) and not list(hub.root.rglob("*.bin"))
    assert not list(hub.root.rglob("*fp16*"))
    with pytest.raises(UserError, match="no folder 'no/where' here, and the hub does not give it"):
        find.model("no/where")


def test_a_hub_id_of_another_pipeline_is_told_before_its_weights_are_fetched(
    theirs, tmp_path, monkeypatch
):
    change(theirs / "model_index.json", _class_name="StableDiffusionPipeline")
    hub = Hub(tmp_path / "snapshot", theirs)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match="StableDiffusionPipeline is not read here"):
        find.model("kakaobrain/small")
    assert not list(hub.root.rglob("*.safetensors"))
