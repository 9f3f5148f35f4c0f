"""Requests: what each mode takes, the events that it yields, and metadata that repeat it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import small_cascade
from PIL import Image

from dalle2_jax.errors import UserError
from dalle2_jax.imaging import files
from dalle2_jax.pipelines import metadata as metadata_module
from dalle2_jax.pipelines import notes, requests
from dalle2_jax.pipelines.dalle2 import DALLE2
from dalle2_jax.pipelines.modes import MODES, takes
from dalle2_jax.pipelines.request import InputImage, InputMask, Request
from dalle2_jax.pipelines.requests import Generated
from dalle2_jax.sampling.overrides import SamplingOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DALLE2:
    folder = tmp_path_factory.mktemp("both") / "model"
    return DALLE2.from_pretrained(small_cascade.write(folder, [*small_cascade.CONFIGS, "ar_prior"]))


@pytest.fixture(scope="module")
def folder_of_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, shape in (("a", (20, 16, 3)), ("b", (16, 16, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


STEPS = SamplingOptions(steps=2)
IMAGE = InputImage(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), "a.png", "")
EXAMPLES = {
    "generate": dict(prompts=("a cat", "dog, flat"), n=2),
    "reconstruct": dict(images=("a.png", "b.png")),
    "variations": dict(images=("a.png", "b.png"), n=2, eta=0.8),
    "interpolate": dict(images=("a.png", "b.png"), frames=3, x_T="fixed"),
    "text_diff": dict(images=("a.png",), prompts=("a cat",), frames=2, theta=0.7, old_prompt="dog"),
    "probe": dict(images=("a.png",)),
    "inpaint": dict(images=("b.png",), prompts=("a cat",), mask="mask.png", n=2, feather=1),
    "outpaint": dict(images=("b.png",), prompts=("a cat",), n=2, right=4, up=2),
}


def request_of(mode, folder, **changes) -> Request:
    fields = {"mode": mode, "seed": 3, "options": STEPS, **EXAMPLES[mode], **changes}
    names = fields.pop("images", ())
    fields["images"] = tuple(InputImage.open(folder / name, name) for name in names)
    if isinstance(fields.get("mask"), str):
        fields["mask"] = InputMask.open(folder / fields["mask"], fields["mask"])
    return Request(**fields)


def generated(model, request, **kwargs) -> list[Generated]:
    events = requests.run(model, request, **kwargs)
    return [event for event in events if isinstance(event, Generated)]


@pytest.mark.parametrize("mode", MODES)
def test_the_metadata_of_an_image_repeat_it_to_the_same_pixels(mode, model, folder_of_inputs):
    images = generated(model, request_of(mode, folder_of_inputs))
    assert len({(one.row, one.index) for one in images}) == len(images) >= 2
    chosen = images[-1]
    metadata = json.loads(json.dumps(chosen.metadata))  # as a file keeps them
    request, only = metadata_module.from_metadata(metadata, folder_of_inputs)
    (again,) = generated(model, request, only=only)
    np.testing.assert_array_equal(again.image, chosen.image)
    assert again.metadata == chosen.metadata
    other = request_of(mode, folder_of_inputs, seed=4) if mode != "text_diff" else None
    if mode in ("generate", "variations", "inpaint", "outpaint"):  # the others sample no noise
        assert np.abs(generated(model, other)[-1].image.astype(int) - chosen.image).max() > 8


def test_a_ranked_image_is_repeated_too(model):
    request = Request(prompts=("a cat", "dog"), n=2, best_of=5, seed=3, options=STEPS, batch_size=4)
    images = generated(model, request)
    scores = [one.metadata["score"] for one in images]
    assert scores[0] >= scores[1] and scores[2] >= scores[3]
    again, only = metadata_module.from_metadata(images[2].metadata, None)
    assert only == (1, images[2].index)
    (one,) = generated(model, again, only=only)
    np.testing.assert_array_equal(one.image, images[2].image)


def test_only_the_batch_of_the_image_is_generated(model):
    request = Request(prompts=("a cat",), n=40, seed=3, options=STEPS)
    events = list(requests.run(model, request, only=(0, 17)))
    (image,) = [event for event in events if isinstance(event, Generated)]
    assert image.index == 17
    steps = [event for event in events if getattr(event, "stage", "") == "decoder"]
    # 2 steps in each of 5 batches of 8: the third batch takes steps 5 and 6 of 10.
    assert {(step.done, step.total) for step in steps} == {(4, 10), (6, 10)}


def test_events_come_in_order_with_previews(model, folder_of_inputs):
    request = Request(prompts=("a cat",), n=2, options=SamplingOptions(steps=4))
    events = list(requests.run(model, request, preview_every=2))
    stages = [e.stage for e in events if isinstance(e, requests.StageProgress)]
    assert list(dict.fromkeys(stages)) == ["prior", "decoder", "upsampler_16"]
    previews = [event for event in events if isinstance(event, requests.Preview)]
    assert [(p.stage, p.done) for p in previews] == [
        ("decoder", 2),
        ("decoder", 4),
        ("upsampler_16", 2),
    ]
    assert all(p.images.dtype == np.uint8 and p.images.ndim == 4 for p in previews)
    assert isinstance(events[-1], Generated)
    # Previews do not change the images.
    plain = generated(model, request)
    for a, b in zip(plain, [e for e in events if isinstance(e, Generated)], strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    # An inversion has no prediction to show; decoding has.
    edit = requests.run(model, request_of("reconstruct", folder_of_inputs), preview_every=1)
    assert {e.stage for e in edit if isinstance(e, requests.Preview)} == {"decoder", "upsampler_16"}


def test_closing_the_events_cancels(model):
    events = requests.run(model, Request(prompts=("a cat",), n=1000, options=STEPS))
    next(events)
    events.close()
    with pytest.raises(StopIteration):
        next(events)


def test_options_of_a_file_are_overridden_one_by_one(model):
    request = Request(prompts=("a cat",), options=SamplingOptions(steps=3, cfg_scale=4.0))
    metadata = metadata_module.to_metadata(request) | {"row": 0, "index": 0}
    changed, _ = metadata_module.from_metadata(
        metadata, None, options=SamplingOptions(steps=5), seed=9
    )
    assert changed.options == SamplingOptions(steps=5, cfg_scale=4.0)
    assert (changed.seed, changed.prompts) == (9, ("a cat",))


def test_an_override_that_changes_how_many_images_there_are_repeats_all(folder_of_inputs):
    request = request_of("variations", folder_of_inputs)
    metadata = metadata_module.to_metadata(request) | {"row": 1, "index": 0}
    image = InputImage.open(folder_of_inputs / "b.png")
    for overrides, only in (
        ({"eta": 0.1, "seed": 4}, (1, 0)),
        ({"images": (image, image)}, (1, 0)),
        ({"images": (image,)}, None),
        ({"n": 3}, None),
    ):
        assert metadata_module.from_metadata(metadata, folder_of_inputs, **overrides)[1] == only
    of_grid = metadata_module.to_metadata(request)  # without a row and an index
    assert metadata_module.from_metadata(of_grid, folder_of_inputs)[1] is None


def test_an_image_that_the_request_does_not_have_is_an_error(model):
    request = Request(prompts=("a cat",), n=2, options=STEPS)
    with pytest.raises(UserError, match=r"the request has no image \(row, index\) = \(1, 0\)"):
        list(requests.run(model, request, only=(1, 0)))


def test_inputs_that_are_missing_or_changed_are_refused(folder_of_inputs, tmp_path):
    metadata = metadata_module.to_metadata(request_of("inpaint", folder_of_inputs)) | {
        "row": 0,
        "index": 0,
    }
    for name in ("b.png", "mask.png"):
        copy = tmp_path / name.replace(".png", "")
        copy.mkdir()
        for file in ("b.png", "mask.png"):
            if file != name:
                (copy / file).write_bytes((folder_of_inputs / file).read_bytes())
        with pytest.raises(UserError, match=f"the input {name} is missing"):
            metadata_module.from_metadata(metadata, copy)
        Image.new("RGB", (16, 16)).save(copy / name)
        with pytest.raises(UserError, match=f"{name} has changed"):
            metadata_module.from_metadata(metadata, copy)
    image = InputImage.open(folder_of_inputs / "b.png")
    request, _ = metadata_module.from_metadata(metadata, folder_of_inputs, images=(image,))
    assert request.images == (image,)


def test_older_files_and_other_weights_are_refused(model):
    with pytest.raises(UserError, match="written by another version"):
        metadata_module.from_metadata({"prompt": "a cat", "seed": 3}, None)
    damaged = {"format": metadata_module.FORMAT, "mode": "probe", "images": [{"sha256": ""}]}
    for metadata in (damaged, damaged | {"images": 3}, damaged | {"prompts": 3}):
        with pytest.raises(UserError, match="the metadata of the file are damaged"):
            metadata_module.from_metadata(metadata, Path("."))
    with pytest.raises(UserError, match=rf"weights tiny \(abc\), not .* \({model.weights_hash}\)"):
        metadata_module.check_weights({"weights": "tiny", "hash": "abc"}, model)
    metadata_module.check_weights({"weights": "any", "hash": model.weights_hash}, model)


def test_metadata_hold_what_the_mode_takes(folder_of_inputs):
    for mode in MODES:
        metadata = metadata_module.to_metadata(request_of(mode, folder_of_inputs))
        for field in dataclasses.fields(Request):
            assert (field.name in metadata) == takes(mode, field.name), (mode, field.name)
    entry = metadata_module.to_metadata(request_of("probe", folder_of_inputs))["images"][0]
    assert entry["name"] == "a.png" and len(entry["sha256"]) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "generat"}, "mode must be one of .*, not 'generat'; did you mean 'generate'"),
        ({}, "mode=generate: 0 x prompt; it takes a prompt"),
        ({"prompts": ("a", " ")}, "a prompt is empty"),
        ({"prompts": ("a",), "n": 3, "best_of": 2}, "best_of=2 must be at least n=3"),
        ({"mode": "probe"}, "mode=probe: 0 x image; it takes an image"),
        ({"mode": "interpolate", "prompts": ("a",)}, "takes two images, or an image and a prompt"),
        ({"prompts": "a cat"}, "prompts must be a list of texts"),
        ({"prompts": ("a",), "eta": 0.3}, "eta goes with mode=variations, not generate"),
        (
            {"mode": "variations", "best_of": 4},
            "best_of goes with mode=generate, not variations",
        ),
        ({"prompts": ("a",), "n": 0}, "n must be a whole number from 1"),
        ({"prompts": ("a",), "seed": -1}, "seed must be a whole number from 0 to 4294967295"),
        ({"prompts": ("a",), "batch_size": "8"}, "batch_size must be a whole number from 1"),
        ({"prompts": ("a",), "size": 0}, "size must be a whole number from 1"),
        ({"mode": "variations", "images": (IMAGE,), "n": 10**5}, "n must be .* to 10000"),
        ({"mode": "variations", "images": (IMAGE,), "eta": 2}, "eta must be a number from 0 to 1"),
        (
            {"mode": "interpolate", "images": (IMAGE, IMAGE), "frames": 1},
            "frames must be .* from 2",
        ),
        (
            {"mode": "interpolate", "images": (IMAGE, IMAGE), "x_T": "no"},
            "x_T must be one of 'slerp', 'fixed', not 'no'",
        ),
        (
            {"mode": "text_diff", "images": (IMAGE,), "prompts": ("a",), "old_prompt": " "},
            "a prompt is empty",
        ),
        ({"mode": "outpaint", "images": (IMAGE,)}, "outpaint: give left, right, up or down"),
        ({"mode": "outpaint", "images": (IMAGE,), "up": -1}, "up must be a whole number from 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        Request(**fields)
    assert "\n" not in str(error.value)


def test_notes_say_what_is_cut_and_what_takes_long(model, folder_of_inputs):
    long = request_of("outpaint", folder_of_inputs, prompts=("cat " * 20,), right=200)
    cut, repeated, many_frames = notes.lines(model, long)
    assert "a prompt is too long, only" in cut
    assert "was not trained to inpaint" in repeated
    assert "frames of 16 px" in many_frames
    assert notes.lines(model, Request(prompts=("a cat",))) == []


def test_a_written_file_is_read_back(model, tmp_path):
    (one,) = generated(model, Request(prompts=("a cat",), options=STEPS))
    files.save_png(tmp_path / "a.png", one.image, one.metadata)
    request, only = metadata_module.from_metadata(files.read_metadata(tmp_path / "a.png"), tmp_path)
    (again,) = generated(model, request, only=only)
    np.testing.assert_array_equal(again.image, one.image)
