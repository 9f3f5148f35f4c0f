"""Karlo, imported, against diffusers: every network, and whole pipelines fed with one noise."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))

import small_unclip  # noqa: E402
from diffusers.schedulers import scheduling_unclip  # noqa: E402

from dalle2_jax import DALLE2  # noqa: E402
from dalle2_jax.imaging.crops import clip_square  # noqa: E402
from dalle2_jax.nets.forward import forward  # noqa: E402
from dalle2_jax.pretrained.convert import import_model  # noqa: E402
from dalle2_jax.pretrained.export import export_model  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # of the output's scale
STEPS = {"prior": 5, "decoder": 6, "upsampler_32": 4}
PROMPTS = ["a red apple", "two small cats on a very long and winding road by the sea"]


@pytest.fixture(scope="module", params=["text_to_image", "image_variations"])
def both(request, tmp_path_factory):
    """(their pipeline, our model)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = getattr(small_unclip, request.param)(folder / "theirs")
    theirs.set_progress_bar_config(disable=True)
    import_model(folder / "theirs", folder / "ours")
    return theirs, DALLE2.from_pretrained(str(folder / "ours"))


def test_export_is_what_diffusers_saved(both, tmp_path_factory):
    """Its classes load it, and every tensor is the same bit for bit."""
    theirs, ours = both
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export_model(Path(ours.weights), folder)
    # Where a folder's "unclip" lies since 2026; without, that version loads none, its own neither.
    diffusers.pipelines.unclip = diffusers.pipelines.deprecated.unclip
    again = type(theirs).from_pretrained(folder)
    for name, module in theirs.components.items():
        loaded = getattr(again, name)
        if not isinstance(module, torch.nn.Module):
            assert type(loaded) is type(module), name
            continue
        state = loaded.state_dict()
        assert state.keys() == module.state_dict().keys()
        for tensor, value in module.state_dict().items():
            assert torch.equal(state[tensor], value), f"{name}: {tensor}"
    for name in ("decoder_scheduler", "super_res_scheduler"):
        assert (
            dict(getattr(again, name).config).items()
            >= {k: v for k, v in getattr(theirs, name).config.items() if k[0] != "_"}.items()
        )
    assert again.tokenizer(PROMPTS).input_ids == theirs.tokenizer(PROMPTS).input_ids
    assert again.tokenizer.pad_token == "!" and again.tokenizer.model_max_length == 77


def assert_close(ours, theirs) -> None:
    theirs = theirs.detach().numpy()
    if theirs.ndim == 4:
        theirs = np.moveaxis(theirs, 1, -1)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def to_torch(x: np.ndarray):
    return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


def test_text(both):
    theirs, ours = both
    tokens = ours.cascade.captions([*PROMPTS, None]).clip
    told = theirs.tokenizer([*PROMPTS, ""], padding="max_length", truncation=True, max_length=77)
    ids, mask = (torch.tensor(told[name]) for name in ("input_ids", "attention_mask"))
    found = forward(ours.cascade.clip, ours.cascade.params["clip"], tokens, method="encode_text")
    np.testing.assert_array_equal(found.txt_mask, mask.bool().numpy())
    expected = theirs.text_encoder(ids)
    assert_close(found.z_txt, expected.text_embeds)
    shown = np.asarray(found.txt_mask)[..., None]  # what stands past the end is not looked at
    assert_close(found.txt_enc * shown, expected.last_hidden_state * torch.tensor(shown))


def test_image(both):
    theirs, ours = both
    if ours.cascade.clip.image is None:
        pytest.skip("it has no image tower")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    section = ours.cascade.clip.image
    standardised = (x / 2 + 0.5 - np.array(section["mean"])) / np.array(section["std"])
    found = forward(ours.cascade.clip, ours.cascade.params["clip"], x, method="encode_image")
    expected = theirs.image_encoder(to_torch(standardised.astype(np.float32)))
    assert_close(found, expected.image_embeds)


def test_image_of_any_size(both):
    """As CLIP's processor prepares it, to the last bit of a pixel."""
    theirs, ours = both
    if ours.cascade.clip.image is None:
        pytest.skip("it has no image tower")
    for h, w in ((32, 32), (100, 57), (33, 640), (20, 24)):
        image = np.random.default_rng(h).integers(0, 256, (h, w, 3), dtype=np.uint8)
        image[: h // 2] //= 3
        pixels = theirs.feature_extractor(images=image, return_tensors="pt").pixel_values
        section = ours.cascade.clip.image
        mean, std = np.array(section["mean"]), np.array(section["std"])
        seen = (clip_square(image, 32) / 255 - mean) / std
        np.testing.assert_allclose(seen, np.moveaxis(pixels[0].numpy(), 0, -1), atol=1e-4)
        expected = theirs.image_encoder(pixels).image_embeds
        assert_close(ours.encode_image(image[None]), expected)


def test_prior(both):
    theirs, ours = both
    if ours.cascade.prior is None:
        pytest.skip("it has no prior")
    x, z, hidden = normal(2, 32), normal(2, 32), normal(2, 77, 32)
    mask = np.arange(77)[None] < np.array([[5], [77]])
    args = x, jnp.array([3, 900]), z, hidden, mask
    found = forward(ours.cascade.prior.network, ours.cascade.params["prior"], *args)
    expected = theirs.prior(
        torch.tensor(x),
        timestep=torch.tensor([3, 900]),
        proj_embedding=torch.tensor(z),
        encoder_hidden_states=torch.tensor(hidden),
        attention_mask=torch.tensor(mask),
    )
    assert_close(found, expected.predicted_image_embedding)
    z_img = forward(ours.cascade.prior.network, ours.cascade.params["prior"], x, method="to_z_img")
    assert_close(z_img, theirs.prior.post_process_latents(torch.tensor(x)))


def test_decoder(both):
    theirs, ours = both
    x, z_img, z_txt, hidden = normal(2, 16, 16, 3), normal(2, 32), normal(2, 32), normal(2, 77, 32)
    mask = np.arange(77)[None] < np.array([[5], [77]])
    cond = {"z_img": z_img, "z_mask": np.ones(2, bool), "txt_enc": hidden, "txt_mask": mask}
    cond |= {"z_txt": z_txt}
    t = np.array([3, 900])
    found = forward(ours.cascade.decoder.network, ours.cascade.params["decoder"], x, t, cond, False)
    context, added = theirs.text_proj(
        image_embeddings=torch.tensor(z_img),
        prompt_embeds=torch.tensor(z_txt),
        text_encoder_hidden_states=torch.tensor(hidden),
        do_classifier_free_guidance=False,
    )
    expected = theirs.decoder(
        to_torch(x),
        timestep=torch.tensor(t),
        encoder_hidden_states=context,
        class_labels=added,
        attention_mask=torch.nn.functional.pad(torch.tensor(mask), (4, 0), value=True),
    )
    assert_close(found, expected.sample)


@pytest.mark.parametrize("part", ["first", "last"])
def test_upsampler(both, part):
    theirs, ours = both
    x, low, t = normal(2, 32, 32, 3), normal(2, 32, 32, 3), np.array([3, 900])
    params = ours.cascade.params["upsampler_32"][part]
    found = forward(ours.cascade.upsamplers["upsampler_32"].network, params, x, t, low, False)
    given = torch.cat([to_torch(x), to_torch(low)], dim=1)
    expected = getattr(theirs, f"super_res_{part}")(given, timestep=torch.tensor(t))
    assert_close(found, expected.sample)


def test_images_of_one_noise(both, monkeypatch):
    """Whole images within 2/255, guidance, masks, nulls and the two upsamplers included."""
    theirs, ours = both
    shapes = {"prior": (32,), "decoder": (16, 16, 3), "upsampler_32": (32, 32, 3)}
    stages = [stage for stage in shapes if stage in ours.cascade.samplers()]
    noise = {stage: normal(STEPS[stage] + 1, 2, *shapes[stage]) for stage in stages}
    # theirs draws none for the last step
    queue = [to_torch(x) for stage in stages for x in noise[stage][1:-1]]
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *a, **k: queue.pop(0))
    given = {
        "decoder_num_inference_steps": STEPS["decoder"],
        "super_res_num_inference_steps": STEPS["upsampler_32"],
        "decoder_latents": to_torch(noise["decoder"][0]),
        "super_res_latents": to_torch(noise["upsampler_32"][0]),
        "output_type": "np",
    }
    steps = {stage: STEPS[stage] for stage in stages}
    if ours.cascade.prior is not None:
        given |= {"prior_num_inference_steps": STEPS["prior"]}
        given |= {"prior_latents": to_torch(noise["prior"][0])}
        expected = theirs(PROMPTS, **given).images
        found = ours.with_settings(steps=steps).generate(PROMPTS, noise=noise)
    else:
        z_img = normal(2, 32)
        expected = theirs(image_embeddings=torch.tensor(z_img), **given).images
        found = ours.with_settings(steps=steps).generate(None, z_img=z_img, noise=noise)
    assert not queue and found.std() > 1 and found.shape == expected.shape
    assert np.abs(found / 255 - expected).max() <= 2 / 255
